#!/usr/bin/env bash
# The same pipeline as run_aquarat_small.sh at its smallest: a check in minutes that every stage runs on this machine.
# Its model is of no use. It has its own base directory, so that it never touches the models of the main job.
set -euo pipefail

: "${PRESET:=lite}" "${RUN:=aquarat-lite}" "${NANOCHAT_BASE_DIR:=$HOME/.cache/nanochat-lite}"
export PRESET RUN NANOCHAT_BASE_DIR
: "${SETUP_EXTRAS:=interp}"
# shellcheck source=scripts/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/scripts/setup.sh"
# shellcheck source=scripts/pipeline.sh
source scripts/pipeline.sh
