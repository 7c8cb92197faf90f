# How the driver runs a stage: what it skips, where its output goes, what a signal does. Sourced by scripts/pipeline.sh, which
# has set LOGS, MARKERS, TO_GO_ON and the numbers of scripts/presets.py before.
# shellcheck shell=bash

# What the result of a stage depends on: its command less launcher and microbatch, the data, and the stages before it.
marker_key() {
  local name=$1 after=$2 word before
  shift 2
  {
    printf '%s\n' "$name" "${NANOCHAT_DATA_DIR:-}" "$AQUA_ROWS" "$(have_shards && echo shards)"
    for before in ${after//,/ }; do
      before="KEY_$before"
      printf '%s\n' "${!before:-}"
    done
    for word in "$@"; do
      case "$word" in --device_batch_size=*) ;; *) printf '%s\n' "$word" ;; esac
    done
  } | git hash-object --stdin
}

have_shards() {
  local files=("$NANOCHAT_BASE_DIR"/base_data/shard_*.parquet)
  [ -z "${NANOCHAT_DATA_DIR:-}" ] || files=("$NANOCHAT_DATA_DIR"/pretrain/shard_*.parquet "${files[@]}")
  [ -e "${files[0]}" ] || [ -e "${files[${#files[@]} - 1]}" ]
}

# logged LOG command...: both streams to LOG and to the terminal; the command's own exit code.
# The command is a job with a process group of its own, so that a signal reaches it once, by pass_on, and never tee.
logged() {
  local log=$1 pipe=$1.pipe tee_pid
  shift
  rm -f "$pipe"
  mkfifo "$pipe"
  (
    trap '' INT TERM
    exec tee -a "$log"
  ) <"$pipe" &
  tee_pid=$!
  set -m
  DRIVER_PID=$$ "$@" </dev/null >"$pipe" 2>&1 &
  job=$!
  set +m
  passed=1
  while [ -n "$passed" ]; do # a signal cuts `wait` short
    passed="" job_status=0
    wait "$job" || job_status=$?
  done
  job=""
  wait "$tee_pid"
  rm -f "$pipe"
  return "$job_status"
}

job="" passed="" asked=""
# The first signal lets the stage finish its step and save, the second ends it at once.
pass_on() {
  passed=1 asked=$1
  [ -n "$job" ] || leave "$1"
  kill -s "$1" -- "-$job" 2>/dev/null || true
}
leave() {
  say ""
  say "interrupted; to go on: $TO_GO_ON"
  if [ "$1" = INT ]; then exit 130; else exit 143; fi
}
trap 'pass_on INT' INT
trap 'pass_on TERM' TERM

# What node 0 says, on every node.
agree() { # agree NAME VALUE
  if [ "$NNODES" -gt 1 ]; then "$PYTHON" -m scripts.nodes "$1" -- "$2"; else printf '%s\n' "$2"; fi
}

# stage NAME after=STAGE,... single|ranks MODULE flags...
stage() {
  local name=$1 after=${2#after=} how=$3 module=$4 began=$SECONDS status=0 decision=run key marker log command
  shift 4
  command=("$PYTHON" -m "$module" "$@")
  if [ "$how" = ranks ] && [ "$NNODES" -gt 1 ]; then
    command=(torchrun --nnodes="$NNODES" --node_rank="$NODE_RANK" --master_addr="$MASTER_ADDR"
      --master_port="$MASTER_PORT" --nproc_per_node="$NPROC" -m "$module" -- "$@")
  elif [ "$how" = ranks ] && [ "$NPROC" -gt 1 ]; then
    command=(torchrun --standalone --nproc_per_node="$NPROC" -m "$module" -- "$@")
  elif [ "$NNODES" -gt 1 ]; then
    command=("$PYTHON" -m scripts.nodes "$name" --run -- "${command[@]}")
  fi
  key=$(marker_key "$name" "$after" "$module" "$@")
  printf -v "KEY_$name" '%s' "$key"
  if [ -n "${DRY_RUN:-}" ]; then
    printf '%-15s' "$name"
    printf ' %q' "${command[@]}"
    printf '\n'
    return
  fi
  # The tokenizer is shared by all models of the base directory; everything else belongs to one model tag.
  marker=$MARKERS/$MODEL_TAG/$name log=$LOGS/$name.log
  [ "$NODE_RANK" = 0 ] || log=$LOGS/$name.node$NODE_RANK.log
  case "$name" in tok_*) marker=$MARKERS/$name ;; esac
  [ "$name" = report ] || [ "$(cat "$marker" 2>/dev/null)" != "$key" ] || decision=skip
  [ -z "${FORCE:-}" ] || decision=anew
  decision=$(agree "$name" "$decision") || return
  if [ "$decision" = skip ]; then
    printf '== %s: finished earlier with these settings\n' "$name"
    return
  fi
  # A training stage that is merely run again goes on from its own last checkpoint, that is, does nothing.
  case "$decision:${module#scripts.}" in
    anew:base_train | anew:mid_train | anew:chat_sft | anew:chat_rl) command+=(--resume=0) ;;
  esac
  mkdir -p "$LOGS" "${marker%/*}"
  rm -f "$marker"
  {
    printf '== %s:' "$name"
    printf ' %q' "${command[@]}"
    printf '\n'
  } | tee -a "$log"
  logged "$log" "${command[@]}" || status=$?
  [ "$status" = 0 ] || return "$status"
  [ "$NODE_RANK" != 0 ] || printf '%s\n' "$key" >"$marker"
  printf '== %s: finished in %d s\n' "$name" $((SECONDS - began)) | tee -a "$log"
}

# A stage without which the run cannot go on.
need() {
  local status=0
  stage "$@" || status=$?
  [ -z "$asked" ] || leave "$asked"
  [ "$status" != 0 ] || return 0
  if [ "$status" = 75 ]; then # nanochat/interruption.py: asked to stop, and saved
    say "stopped; to go on: $TO_GO_ON"
    exit 75
  fi
  say ""
  say "error: stage $1 failed with exit code $status; the last lines of its log:"
  tail -n 15 "$LOGS/$1$([ "$NODE_RANK" = 0 ] || echo ".node$NODE_RANK").log" | sed 's/^/    /' >&2
  say "whole log:  $LOGS/$1.log"
  say "to go on:   $TO_GO_ON"
  exit "$status"
}
