#!/usr/bin/env bash
# Batch generation on several nodes of a Slurm cluster: sbatch scripts/slurm_batch.sh [arguments of `xdit batch`]
# PROMPTS and OUTPUT have to be on a file system that all nodes share. Submit the same again where time ran out.
#SBATCH --job-name=xfuser-batch
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=04:00:00
#SBATCH --signal=B:TERM@120
set -euo pipefail

gpus="${GPUS_PER_NODE:-8}"
ranks="${RANKS_PER_GROUP:-1}"
first="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"
address="$first:${PORT:-6379}"

# Nobody else on these nodes may give this cluster work.
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN
RAY_AUTH_TOKEN="$(python -c 'import secrets; print(secrets.token_hex(32))')"
export RAY_USAGE_STATS_ENABLED=0

# --block keeps each node's Ray inside its step, so that Slurm ends it with the job.
srun --nodes=1 --ntasks=1 --nodelist="$first" \
    ray start --head --port="${PORT:-6379}" --dashboard-host=127.0.0.1 --num-gpus="$gpus" --block &
sleep "${HEAD_SECONDS:-20}"
if (( SLURM_NNODES > 1 )); then
    srun --nodes="$((SLURM_NNODES - 1))" --ntasks="$((SLURM_NNODES - 1))" --exclude="$first" \
        ray start --address="$address" --num-gpus="$gpus" --block &
fi

# Slurm tells this shell two minutes before the time is over (--signal); the command hands back what is in flight.
xdit batch --ray_address "$address" --groups "1,$((SLURM_NNODES * gpus / ranks))" --ulysses_degree "$ranks" \
    --grace 90 --prompts "${PROMPTS:?name a file of prompts}" --output_dir "${OUTPUT:-outputs/batch}" "$@" &
command=$!
trap 'kill -TERM "$command"' TERM
code=0
wait "$command" || code=$?
kill -0 "$command" 2>/dev/null && { wait "$command" || code=$?; }
exit "$code"
