#!/usr/bin/env bash
# The main job: from an empty machine to a model trained by reinforcement learning on AQuA-RAT, and its report.
#
#   bash run_aquarat_small.sh                  on 8 GPUs, 1 GPU or a CPU: the numbers follow the machine
#   DEPTH=20 bash run_aquarat_small.sh         the 561M model; every number of scripts/presets.py can be set so
#   DRY_RUN=1 bash run_aquarat_small.sh        commands, parameters, FLOPs, time and dollars; runs nothing
#
# Run it again to go on where it stopped. RUN names the run (default aquarat-small).
set -euo pipefail

: "${SETUP_EXTRAS:=interp}"
# shellcheck source=scripts/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/scripts/setup.sh"
: "${RUN:=${WANDB_RUN:-aquarat-small}}"
# shellcheck source=scripts/pipeline.sh
source scripts/pipeline.sh
