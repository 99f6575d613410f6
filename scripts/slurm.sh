#!/usr/bin/env bash
# Generate on several nodes of a Slurm cluster: sbatch scripts/slurm.sh [arguments of scripts/generate.py]
# The degrees have to multiply to nodes x GPUs: 2 x 8 = cfg 2 x ulysses 8 here. OUTPUT must be on a shared file system.
#SBATCH --job-name=xfuser
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=01:00:00
set -euo pipefail

first="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"

# One torchrun a node; they meet at the first one. --kill-on-bad-exit stops all nodes when one fails.
srun --kill-on-bad-exit=1 torchrun \
    --nnodes="$SLURM_NNODES" \
    --nproc_per_node="${GPUS_PER_NODE:-8}" \
    --rdzv_id="$SLURM_JOB_ID" \
    --rdzv_backend=c10d \
    --rdzv_endpoint="$first:${PORT:-29500}" \
    "$SLURM_SUBMIT_DIR/scripts/generate.py" \
    --model_type flux --model black-forest-labs/FLUX.1-dev --height 1024 --width 1024 --num_inference_steps 30 \
    --prompt "a red fox asleep in the snow" --negative_prompt "blurred" --true_cfg_scale 4 \
    --use_cfg_parallel --ulysses_degree 8 \
    --use_cache Fb --enable_adacorrection --adacorr_budget 0.5 \
    --output_dir "${OUTPUT:-outputs}" "$@"
