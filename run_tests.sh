#!/usr/bin/env bash
# Set-up, then every test that this machine can run: style, types, shell, Rust, Python.
#
#   bash run_tests.sh             everything; tests marked gpu only where there is a GPU
#   FAST=1 bash run_tests.sh      without the tests that take minutes
#   LONG=1 bash run_tests.sh      also those that take many minutes or want a quiet machine
#   bash run_tests.sh -k bpe      more words go to pytest
set -euo pipefail

: "${SETUP_EXTRAS:=test interp}"
# shellcheck source=scripts/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/scripts/setup.sh"

failed=()
check() { # check NAME command...
  local name=$1 began=$SECONDS
  shift
  printf '== %s\n' "$name"
  "$@" || failed+=("$name")
  printf '== %s: %d s\n\n' "$name" $((SECONDS - began))
}

every_script() { # every_script command...: on each shell script of the repository
  local scripts=(./*.sh scripts/*.sh .ci/run)
  "$@" "${scripts[@]}"
}

bash_reads() {
  local script
  for script in "$@"; do bash -n "$script" || return; done
}

export PYO3_PYTHON="${PYO3_PYTHON:-$(command -v python)}"
rust=(--manifest-path rustbpe/Cargo.toml)
cargo clippy --version >/dev/null 2>&1 || rustup component add clippy rustfmt ||
  die "cargo clippy is missing; install it: rustup component add clippy rustfmt"

check "ruff check" ruff check .
check "ruff format" ruff format --check .
check "mypy" mypy
check "bash -n" every_script bash_reads
check "shellcheck" every_script shellcheck -x
check "cargo fmt" cargo fmt --check "${rust[@]}"
check "cargo clippy" cargo clippy "${rust[@]}" --all-targets --all-features -- -D warnings
check "cargo test" cargo test "${rust[@]}"

marks=""
[ -n "${LONG:-}" ] || marks="not long"
[ -z "${FAST:-}" ] || marks="${marks:+$marks and }not slow"
nvidia-smi >/dev/null 2>&1 || marks="${marks:+$marks and }not gpu"
if [ ${#failed[@]} -gt 0 ]; then printf 'failed so far: %s\n' "${failed[*]}"; fi
# A worker on each core, each computing on one: threads of several workers would wait for each other.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
workers=(-n logical --maxprocesses=8 --dist loadfile --no-loadscope-reorder)
[ -z "${LONG:-}" ] || workers=() # some of the long ones want the machine to themselves
check "pytest" python -m pytest -m "$marks" --durations=10 "${workers[@]}" "$@"

if [ ${#failed[@]} -gt 0 ]; then
  printf 'failed:'
  printf ' %s;' "${failed[@]}"
  printf '\n'
  exit 1
fi
echo "all checks passed in $((SECONDS / 60)) min $((SECONDS % 60)) s"
