#!/usr/bin/env bash
# Train on this machine: launch/local.sh CONFIG [key=value ...]
# NPROC sets the number of processes; without it DeepSpeed starts one for each GPU.
set -euo pipefail

if (($# < 1)); then
    echo "usage: [NPROC=2] $0 CONFIG [key=value ...]" >&2
    exit 2
fi
bin=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)/.venv/bin
exec "$bin/deepspeed" ${NPROC:+--num_accelerators "$NPROC"} --module cel_dist.train "$@"
