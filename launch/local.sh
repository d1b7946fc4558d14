#!/usr/bin/env bash
# Train on this machine: launch/local.sh CONFIG [key=value ...]
# NPROC sets the number of processes; without it DeepSpeed starts one for each GPU. MASTER_PORT sets the port where they
# meet; without it any free one, because two jobs must not meet at DeepSpeed's fixed default.
set -euo pipefail

if (($# < 1)); then
    echo "usage: [NPROC=2] $0 CONFIG [key=value ...]" >&2
    exit 2
fi
bin=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)/.venv/bin
port=${MASTER_PORT:-$("$bin/python" -c 'from cel_dist.distributed import free_port; print(free_port())')}
exec "$bin/deepspeed" --master_port "$port" ${NPROC:+--num_accelerators "$NPROC"} --module cel_dist.train "$@"
