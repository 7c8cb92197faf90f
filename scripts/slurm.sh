#!/usr/bin/env bash
# The main job under Slurm, one task on each node; NANOCHAT_BASE_DIR must lie on storage that all nodes see.
#
#   sbatch --nodes=2 --gpus-per-node=8 --export=ALL,NANOCHAT_BASE_DIR=/shared/nanochat scripts/slurm.sh
#
# A job that was requeued goes on where it stopped: finished stages are skipped, the others start from their checkpoint.
#SBATCH --job-name=aquarat
#SBATCH --ntasks-per-node=1
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --output=aquarat-%j.log
set -euo pipefail

cd "${SLURM_SUBMIT_DIR:-.}"
hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
MASTER_ADDR=${hosts%%$'\n'*} # not through head, which hangs up on scontrol, and pipefail would end the job without a word
# Jobs that share a node must not share a port.
MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000 * 2))
export MASTER_ADDR MASTER_PORT

# $SLURM_NODEID is each task's own, so it is read inside.
# shellcheck disable=SC2016
exec srun --kill-on-bad-exit=1 bash -c 'NNODES=$SLURM_NNODES NODE_RANK=$SLURM_NODEID exec bash '"${RUN_SCRIPT:-run_aquarat_small.sh}"
