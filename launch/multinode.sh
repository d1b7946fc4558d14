#!/usr/bin/env bash
# Train on several nodes: launch/multinode.sh HOSTFILE CONFIG [key=value ...]
#
# HOSTFILE has a line `name slots=PROCESSES` for each node. The checkout, its .venv and the data lie at the same path on
# every node. Run it once on the first node, which reaches the others through ssh and pdsh. Where there is no ssh, run it
# on every node with NODE_RANK=0, 1, ... and MASTER_ADDR (and MASTER_PORT, default 29500) of the first one.
set -euo pipefail

if (($# < 2)); then
    echo "usage: [NODE_RANK=i MASTER_ADDR=host] $0 HOSTFILE CONFIG [key=value ...]" >&2
    exit 2
fi
hostfile=$1
shift
if [[ ! -r $hostfile ]]; then
    echo "error: cannot read the hostfile $hostfile; it needs a line 'name slots=PROCESSES' for each node" >&2
    exit 2
fi

options=(--hostfile "$hostfile" --master_port "${MASTER_PORT:-29500}")
if [[ -n ${MASTER_ADDR:-} ]]; then
    options+=(--master_addr "$MASTER_ADDR")
fi
if [[ -n ${NODE_RANK:-} ]]; then
    if [[ -z ${MASTER_ADDR:-} ]]; then
        echo "error: NODE_RANK is set but MASTER_ADDR is not; give the address of the first node" >&2
        exit 2
    fi
    options+=(--no_ssh --node_rank "$NODE_RANK")
fi
bin=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)/.venv/bin
exec "$bin/deepspeed" "${options[@]}" --module cel_dist.train "$@"
