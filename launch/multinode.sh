#!/usr/bin/env bash
# Train on several nodes: launch/multinode.sh HOSTFILE CONFIG [key=value ...]
#
# HOSTFILE has a line `name slots=PROCESSES` for each node. The checkout, its .venv, the data and the run folder lie at the
# same path on every node. Run it once, where all nodes can be reached through ssh and pdsh is installed. Where there is no
# ssh, run it on every node with NODE_RANK=0, 1, ... and, if the name of the first node in HOSTFILE is not one that the
# others find it by, its MASTER_ADDR. See docs/multinode.md.
set -euo pipefail

if (($# < 2)); then
    echo "usage: [NODE_RANK=i] [MASTER_ADDR=host] [MASTER_PORT=29500] [MAX_RESTARTS=3] $0 HOSTFILE CONFIG [key=value ...]" >&2
    exit 2
fi
options=(--hostfile "$1" --max-restarts "${MAX_RESTARTS:-3}")
shift
[[ -n ${MASTER_ADDR:-} ]] && options+=(--master-addr "$MASTER_ADDR")
[[ -n ${MASTER_PORT:-} ]] && options+=(--master-port "$MASTER_PORT")
[[ -n ${NODE_RANK:-} ]] && options+=(--no-ssh --node-rank "$NODE_RANK")
cel=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)/.venv/bin/cel
exec "$cel" train "$@" "${options[@]}"
