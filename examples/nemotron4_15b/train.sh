#!/usr/bin/env bash
# Start one node's part of a run; on several nodes, start it on each of them.
#
#   ./train.sh [key=value ...]                                     one node
#   NODES=4 NODE_RANK=0 HEAD=node-a ./train.sh [key=value ...]     on each of four nodes, NODE_RANK 0 to 3
#   NODES=3:4 ...                                                  starts with 3, accepts the 4th when it arrives
#
# Variables: GPUS (of this node; 8), NODES (1), NODE_RANK (SLURM's, else 0), HEAD (host of node 0), PORT (29400), JOB
# (one name for all nodes of a run), RESTARTS (3), LOG_DIR (one file per rank; logs), RUN (run.yaml), COMMAND (train, or
# doctor), PYTHON (python). The exit status comes from `megatron-cpt launch`. 75: stopped by a signal after a save,
# start it again.
set -euo pipefail

here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=cluster.sh
source "$here/cluster.sh"

NODES=${NODES:-1} NODE_RANK=${NODE_RANK:-${SLURM_NODEID:-0}} GPUS=${GPUS:-8}
COMMAND=${COMMAND:-train}
if [[ $COMMAND == doctor ]]; then GPUS=1 RESTARTS=0; fi # one process per node; a finding is no reason to restart
options=(--nproc-per-node "$GPUS" --max-restarts "${RESTARTS:-3}" --log-dir "${LOG_DIR:-logs}")

if [[ $NODES != 1 ]]; then
    : "${HEAD:?is the host name of node 0; every node must reach it}"
    # Node 0 hosts the rendezvous. is_host is explicit, because torchrun's guess from host names fails on nodes with
    # several names. A late node has 15 minutes to join.
    is_host=$([[ $NODE_RANK == 0 ]] && echo 1 || echo 0)
    options+=(
        --nnodes "$NODES"
        --rdzv-id "${JOB:-nemotron4-15b}"
        --rdzv-backend c10d
        --rdzv-endpoint "$HEAD:${PORT:-29400}"
        --rdzv-conf "is_host=$is_host,join_timeout=900"
    )
fi

# exec: signals reach the launcher directly.
exec "${PYTHON:-python}" -m megatron_cpt launch "${options[@]}" -- \
    "$COMMAND" "${RUN:-$here/run.yaml}" "$@"
