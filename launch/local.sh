#!/usr/bin/env bash
# Train on this machine: launch/local.sh CONFIG [key=value ...]
# NPROC sets the number of processes; without it there is one for each GPU. MAX_RESTARTS (default 3) is how often a run
# that failed goes on by itself.
set -euo pipefail

if (($# < 1)); then
    echo "usage: [NPROC=2] [MAX_RESTARTS=3] $0 CONFIG [key=value ...]" >&2
    exit 2
fi
gpus=$(nvidia-smi --list-gpus 2>/dev/null | wc -l) || gpus=0
cel=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)/.venv/bin/cel
exec "$cel" train "$@" --nproc "${NPROC:-$((gpus > 0 ? gpus : 1))}" --max-restarts "${MAX_RESTARTS:-3}"
