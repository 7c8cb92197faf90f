# Set-up, sourced by run_aquarat_small.sh, run_aquarat_lite.sh and run_tests.sh:
#   uv and Rust are found or installed, the packages of pyproject.toml go into .venv, rustbpe is built, .env is read.
# A second time nothing has changed, and it takes no time and no network. DRY_RUN=1 and NO_INSTALL=1 install nothing.
# After it, `python` is the environment's and the working directory is the root of the repository.
#
# SETUP_EXTRAS: extras of pyproject.toml to install, with blanks between.
# shellcheck shell=bash

say() { printf '%s\n' "$*" >&2; }
die() { say "error: $*"; exit 1; }

# A relative folder in the environment means the place where the user stands, not the repository. A tilde that no shell has
# expanded, as in .env and sky.yaml, is the home: Python would read it so, and the drivers must mean the same folder.
absolute_folders() {
  local folder
  for folder in NANOCHAT_BASE_DIR NANOCHAT_DATA_DIR AQUA_DATA_DIR NANOCHAT_AQUA_DIR; do
    case "${!folder:-}" in
      '' | /*) ;;
      [~] | [~]/*) export "$folder=$HOME${!folder#\~}" ;;
      [~]*) ;;
      *) export "$folder=$PWD/${!folder}" ;;
    esac
  done
}
absolute_folders
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1

ENVIRONMENT=${UV_PROJECT_ENVIRONMENT:-.venv}

# The command line of a Python that can run this project, or nothing.
find_python() {
  local candidate
  for candidate in "$ENVIRONMENT/bin/python" python3 python; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
      printf '%s\n' "$candidate"
      return
    fi
  done
}

find_or_install_uv() {
  PATH="$HOME/.local/bin:$HOME/.cargo/bin:$PATH"
  command -v uv >/dev/null && return
  say "uv is missing: installing it"
  if command -v curl >/dev/null; then
    curl -LsSf --connect-timeout 10 --max-time 120 https://astral.sh/uv/install.sh 2>/dev/null | sh >&2 || true
  fi
  command -v uv >/dev/null && return
  local python
  python=$(find_python)
  [ -n "$python" ] || die "Python 3.10 or newer is missing; install it, for example: sudo apt-get install python3"
  say "uv's installer cannot be reached: trying pip"
  # The system's Python may refuse (PEP 668) or lack --user inside an environment of its own: take what it allows.
  "$python" -m pip install --quiet --user uv >&2 2>/dev/null ||
    "$python" -m pip install --quiet uv >&2 2>/dev/null ||
    "$python" -m pip install --quiet --user --break-system-packages uv >&2 || true
  PATH="$("$python" -c 'import sysconfig; print(sysconfig.get_path("scripts"))'):$PATH"
  hash -r
  command -v uv >/dev/null || die "uv could not be installed; see https://docs.astral.sh/uv, then run this again"
}

find_or_install_rust() {
  command -v cargo >/dev/null && return
  say "Rust is missing: installing it with rustup"
  command -v curl >/dev/null || die "curl is missing; install it, or Rust from https://rustup.rs, then run this again"
  curl -sSf --proto '=https' --tlsv1.2 --connect-timeout 10 https://sh.rustup.rs |
    sh -s -- -y --profile minimal --no-modify-path >&2 || true
  hash -r
  command -v cargo >/dev/null || die "Rust could not be installed; see https://rustup.rs, then run this again"
}

# A fingerprint of all that decides what the environment holds. uv itself does not look at the sources of a path dependency.
fingerprint() {
  {
    printf '%s\n' "$PWD" "${SETUP_EXTRAS:-}"
    cat pyproject.toml
    find rustbpe -name target -prune -o -name .venv -prune -o -type f \( -name '*.rs' -o -name '*.toml' -o -name Cargo.lock \) -print |
      LC_ALL=C sort | while IFS= read -r file; do cat "$file"; done
  } | git hash-object --stdin
}

install() {
  local stamp print extra flags=()
  print=$(fingerprint)
  for extra in ${SETUP_EXTRAS:-}; do flags+=(--extra "$extra"); done
  stamp="$ENVIRONMENT/.setup-${SETUP_EXTRAS// /-}"
  if [ "$(cat "$stamp" 2>/dev/null)" != "$print" ]; then
    find_or_install_uv
    find_or_install_rust
    say "installing packages into $ENVIRONMENT and building rustbpe (once; minutes)"
    # --inexact: the tests' packages stay when the main job syncs, and the other way round.
    # --compile-bytecode: where PYTHONDONTWRITEBYTECODE is set, as in many containers, every start would compile anew.
    uv sync --inexact --compile-bytecode ${flags[@]+"${flags[@]}"} ||
      die "uv could not install the packages; the lines above say why. Free disk: $(df -h . | awk 'END {print $4}')"
    printf '%s\n' "$print" >"$stamp"
  fi
}

# .env by python-dotenv's rules, printed as quoted export lines: nothing in it is ever run by a shell.
# What the environment has already wins.
dotenv_exports() {
  python - "$1" <<'PYTHON'
import os, re, shlex, sys
from dotenv import dotenv_values

for name, value in dotenv_values(sys.argv[1]).items():
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
        print(f".env: {name!r} is no name of a variable; left out", file=sys.stderr)
    elif value and name not in os.environ:
        print(f"export {name}={shlex.quote(value)}")
PYTHON
}

read_dotenv() {
  local exports
  [ -f .env ] || return 0
  exports=$(dotenv_exports .env) || die ".env could not be read"
  eval "$exports"
}

command -v git >/dev/null || die "git is missing; install it, for example: sudo apt-get install git"
[ -n "${DRY_RUN:-}${NO_INSTALL:-}" ] || install
if [ -x "$ENVIRONMENT/bin/python" ]; then
  case "$ENVIRONMENT" in /*) PATH="$ENVIRONMENT/bin:$PATH" ;; *) PATH="$PWD/$ENVIRONMENT/bin:$PATH" ;; esac
  export PATH
  PYTHON=python
  read_dotenv
  absolute_folders
else
  PYTHON=$(find_python)
  [ -n "$PYTHON" ] || die "Python 3.10 or newer is missing; install it, for example: sudo apt-get install python3"
  [ ! -f .env ] || say "nothing is installed yet: .env is not read"
fi
