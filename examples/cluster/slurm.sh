#!/bin/bash
# Two nodes of eight GPUs: sbatch examples/cluster/slurm.sh apples.toml [key=value …]
# SIGTERM comes two minutes before the time is up: the run saves, leaves with 143, and the job is queued again.
#SBATCH --job-name=sfumato
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --time=12:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
set -euo pipefail
: "${1:?give a recipe}"
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
srun torchrun --nnodes="$SLURM_NNODES" --nproc-per-node="${SLURM_GPUS_ON_NODE:-8}" --max-restarts=3 \
    --rdzv-backend=c10d --rdzv-id="$SLURM_JOB_ID" --rdzv-endpoint="$head:${RDZV_PORT:-29500}" \
    -m sfumato train "$@"
