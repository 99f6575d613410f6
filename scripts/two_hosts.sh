#!/usr/bin/env bash
# Generate on two hosts without a scheduler. On each of them, in the same checkout:
#
#   on the first:   NODE_RANK=0 FIRST_HOST=10.0.0.1 bash scripts/two_hosts.sh [arguments of scripts/generate.py]
#   on the second:  NODE_RANK=1 FIRST_HOST=10.0.0.1 bash scripts/two_hosts.sh [the same arguments]
#
# FIRST_HOST is the first host's address as both see it; PORT (29500) must be open there, and the hosts must reach each
# other on any port. GPUS is the number of processes a host (1); TORCHRUN the command (torchrun). The first one writes.
set -euo pipefail

: "${NODE_RANK:?0 on the first host, 1 on the second}" "${FIRST_HOST:?address of the first host}"
root="$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)"

# Without arguments: the shipped model, the two hosts each evaluating one branch of guidance.
[ "$#" -gt 0 ] || set -- --model tiny-dit --class_label 0 1 2 3 --use_cfg_parallel --use_cache Tea

# The static rendezvous gives ranks in the order of --node_rank, so that rank 0 is on the first host.
exec "${TORCHRUN:-torchrun}" --nnodes=2 --node_rank="$NODE_RANK" --nproc_per_node="${GPUS:-1}" \
    --rdzv_backend=static --rdzv_endpoint="$FIRST_HOST:${PORT:-29500}" "$root/scripts/generate.py" "$@"
