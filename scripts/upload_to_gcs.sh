#!/usr/bin/env bash
# Upload a run to Google Cloud Storage: a front of scripts/upload_to_gcs.py, whose flags it takes.
#
#   bash scripts/upload_to_gcs.sh --bucket gs://NAME --run-name RUN [--exclude-data] [--dry-run] [--yes]
#
# A dry run installs nothing and needs no network.
set -euo pipefail

for word in "$@"; do
  case "$word" in --dry-run | --dry_run | -h | --help) NO_INSTALL=1 ;; esac
done
export NO_INSTALL="${NO_INSTALL:-}"
: "${SETUP_EXTRAS:=gcs}"
# shellcheck source=scripts/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
exec "$PYTHON" -m scripts.upload_to_gcs "$@"
