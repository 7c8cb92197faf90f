# The pipeline, sourced by run_aquarat_small.sh and run_aquarat_lite.sh after scripts/setup.sh.
#
# Numbers come from scripts/presets.py through scripts/plan.py, and from environment variables of the same names.
# A stage is skipped when its marker says that it finished with these very settings, after stages that did; so the same
# command takes up where it stopped. DRY_RUN=1 prints plan and commands; FORCE=1 starts every stage again.
#
# Several machines: NNODES, NODE_RANK and MASTER_ADDR (MASTER_PORT, default 29500) on each, NANOCHAT_BASE_DIR on storage that
# all of them see. Node 0 decides what to skip and runs what needs one process; the others follow (scripts/nodes.py).
# shellcheck shell=bash

: "${NNODES:=1}" "${NODE_RANK:=0}" "${MASTER_ADDR:=127.0.0.1}" "${MASTER_PORT:=29500}"
export NNODES NODE_RANK MASTER_ADDR MASTER_PORT
: "${NANOCHAT_BASE_DIR:=$HOME/.cache/nanochat}"
export RUN NANOCHAT_BASE_DIR PYTHONUNBUFFERED=1

settings=$("$PYTHON" -m scripts.plan --shell) || exit
[ -z "${DRY_RUN:-}" ] || "$PYTHON" -m scripts.plan
eval "$settings"

export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$THREADS}"
LOGS=$NANOCHAT_BASE_DIR/runs/$RUN/logs
MARKERS=$NANOCHAT_BASE_DIR/finished
TO_GO_ON="${OVERRIDES:+$OVERRIDES }bash $0"

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
  [ -n "${FORCE:-}" ] || [ "$name" = report ] || [ "$(cat "$marker" 2>/dev/null)" != "$key" ] || decision=skip
  decision=$(agree "$name" "$decision") || return
  if [ "$decision" = skip ]; then
    printf '== %s: finished earlier with these settings\n' "$name"
    return
  fi
  mkdir -p "$LOGS" "${marker%/*}"
  rm -f "$marker"
  {
    printf '== %s:' "$name"
    printf ' %q' "${command[@]}"
    printf '\n'
  } | tee -a "$log"
  "${command[@]}" </dev/null 2>&1 | tee -a "$log" || status=$?
  [ "$status" = 0 ] || return "$status"
  [ "$NODE_RANK" != 0 ] || printf '%s\n' "$key" >"$marker"
  printf '== %s: finished in %d s\n' "$name" $((SECONDS - began)) | tee -a "$log"
}

# A stage without which the run cannot go on.
need() {
  local status=0
  stage "$@" || status=$?
  [ "$status" != 0 ] || return 0
  say ""
  say "error: stage $1 failed with exit code $status; the last lines of its log:"
  tail -n 15 "$LOGS/$1$([ "$NODE_RANK" = 0 ] || echo ".node$NODE_RANK").log" | sed 's/^/    /' >&2
  say "whole log:  $LOGS/$1.log"
  say "to go on:   $TO_GO_ON"
  exit "$status"
}

trap 'say ""; say "interrupted; to go on: $TO_GO_ON"; exit 130' INT

# Every node must see the folder that node 0 writes to.
if [ "$NNODES" -gt 1 ] && [ -z "${DRY_RUN:-}" ]; then
  mkdir -p "$NANOCHAT_BASE_DIR"
  [ "$NODE_RANK" != 0 ] || date +%s%N >"$NANOCHAT_BASE_DIR/.nodes"
  seen=$(agree nodes "$(cat "$NANOCHAT_BASE_DIR/.nodes" 2>/dev/null)") || exit
  [ "$(cat "$NANOCHAT_BASE_DIR/.nodes" 2>/dev/null)" = "$seen" ] ||
    die "node $NODE_RANK does not see node 0's NANOCHAT_BASE_DIR=$NANOCHAT_BASE_DIR; put it on shared storage"
  # What one node finds, the data or the network, must count for all: their commands have to be the same.
  AQUA_ROWS=$(agree aqua "$AQUA_ROWS") NETWORK=$(agree network "$NETWORK") || exit
fi

# Flags that every stage with a model knows; an empty knob leaves its flag to the stage.
common=(--run="$RUN" --seed="$SEED" --model_tag="$MODEL_TAG"
  ${DEVICE_TYPE:+--device_type="$DEVICE_TYPE"} ${DTYPE:+--dtype="$DTYPE"})

rates=(--matrix_lr="$MATRIX_LR" --embedding_lr="$EMBEDDING_LR"
  --unembedding_lr="$UNEMBEDDING_LR" --scalar_lr="$SCALAR_LR")

# Splits the EXTRA_ knobs at blanks, without expanding anything in them.
extra() { IFS=' ' read -r -a more <<<"$1"; }

# Data. Whoever names a folder, or has the files already, downloads nothing.
if [ -z "$AQUA_ROWS" ] && [ "$NETWORK" = 1 ]; then
  if stage prepare_aqua after= single scripts.prepare_aqua --output_dir="$NANOCHAT_BASE_DIR/aqua"; then
    AQUA_ROWS=$NANOCHAT_BASE_DIR/aqua
  else
    say "warning: AQuA-RAT cannot be had; going on with synthetic problems"
  fi
fi
if [ -z "$AQUA_ROWS" ]; then
  RL_DATASET=${RL_DATASET:-SYNTHETIC}
  EVAL_TASKS=${EVAL_TASKS/AQUA|SYNTHETIC/SYNTHETIC}
fi
if [ -z "${NANOCHAT_DATA_DIR:-}" ] && [ "$NUM_SHARDS" -gt 0 ] && [ "$NETWORK" = 1 ]; then
  need data after= single nanochat.dataset -n "$NUM_SHARDS"
fi

# Tokenizer
extra "$EXTRA_TOK_TRAIN"
need tok_train after= single scripts.tok_train --run="$RUN" --seed="$SEED" \
  --max_chars="$TOK_MAX_CHARS" --vocab_size="$VOCAB_SIZE" ${more[@]+"${more[@]}"}
need tok_eval after=tok_train single scripts.tok_eval --run="$RUN"

# Base model
extra "$EXTRA_BASE_TRAIN"
need base_train after=tok_train ranks scripts.base_train "${common[@]}" "${rates[@]}" \
  --depth="$DEPTH" ${N_EMBD:+--n_embd="$N_EMBD"} ${N_HEAD:+--n_head="$N_HEAD"} --smear="$SMEAR" \
  --max_seq_len="$SEQUENCE_LEN" --num_iterations="$BASE_STEPS" \
  --total_batch_size="$BASE_BATCH_TOKENS" --device_batch_size="$BASE_DEVICE_BATCH_SIZE" \
  --synthetic_share="$SYNTHETIC_SHARE" --drill_iterations="$DRILL_ITERATIONS" --isolate="$ISOLATE" \
  --eval_every="$EVAL_EVERY" --eval_tokens="$EVAL_TOKENS" ${more[@]+"${more[@]}"}
need base_loss after=base_train ranks scripts.base_loss "${common[@]}" \
  --device_batch_size="$BASE_DEVICE_BATCH_SIZE" --split_tokens="$EVAL_TOKENS"
need base_eval after=base_train ranks scripts.base_eval "${common[@]}" --max_per_task="$CORE_EXAMPLES"

# Chat model: mid-training, supervised fine-tuning, reinforcement learning, each evaluated
evaluate() { # evaluate SOURCE after=STAGES flags...
  extra "$EXTRA_CHAT_EVAL"
  need "chat_eval_$1" "$2" ranks scripts.chat_eval "${common[@]}" -i "$1" ${EVAL_TASKS:+-a "$EVAL_TASKS"} \
    -x "$EVAL_EXAMPLES" -m "$MAX_NEW_TOKENS" --mode="$EVAL_MODE" "${@:3}" ${more[@]+"${more[@]}"}
}

extra "$EXTRA_MID_TRAIN"
need mid_train after=base_train ranks scripts.mid_train "${common[@]}" "${rates[@]}" --num_iterations="$MID_ITERATIONS" \
  --total_batch_size="$MID_BATCH_TOKENS" --device_batch_size="$MID_DEVICE_BATCH_SIZE" \
  --synthetic_examples="$SYNTHETIC_EXAMPLES" --other_examples="$OTHER_EXAMPLES" \
  --eval_every="$EVAL_EVERY" --eval_tokens="$EVAL_TOKENS" ${more[@]+"${more[@]}"}
evaluate mid after=mid_train

extra "$EXTRA_CHAT_SFT"
need chat_sft after=mid_train ranks scripts.chat_sft "${common[@]}" "${rates[@]}" --num_iterations="$SFT_ITERATIONS" \
  --total_batch_size="$SFT_BATCH_TOKENS" --device_batch_size="$SFT_DEVICE_BATCH_SIZE" \
  --aqua_train_examples="$AQUA_TRAIN_EXAMPLES" --aqua_val_examples="$AQUA_VAL_EXAMPLES" \
  --synthetic_examples="$SYNTHETIC_EXAMPLES" --other_examples="$OTHER_EXAMPLES" \
  --eval_every="$EVAL_EVERY" ${more[@]+"${more[@]}"}
evaluate sft after=chat_sft

reinforce() { # reinforce NAME flags...
  extra "$EXTRA_CHAT_RL"
  need "$1" after=chat_sft ranks scripts.chat_rl "${common[@]}" --dataset="${RL_DATASET:-AQUA}" --max_steps="$RL_STEPS" \
    --examples_per_step="$EXAMPLES_PER_STEP" --num_samples="$NUM_SAMPLES" --max_new_tokens="$MAX_NEW_TOKENS" \
    --temperature="$TEMPERATURE" --learning_rate="$RL_LEARNING_RATE" --device_batch_size="$RL_DEVICE_BATCH_SIZE" \
    --eval_every="$RL_EVAL_EVERY" --eval_examples="$RL_EVAL_EXAMPLES" --save_every="$RL_SAVE_EVERY" \
    --kl_every="$KL_EVERY" --attn_every="$ATTN_EVERY" "${@:2}" ${more[@]+"${more[@]}"}
}
reinforce chat_rl
evaluate rl after=chat_rl,chat_eval_sft --compare=sft

# Two controls: how much of a gain is only a choice of style, and what is learnt from rewards that mean nothing.
if [ "$CONTROLS" = 1 ]; then
  need control_forbid_bare after=chat_sft ranks scripts.chat_eval "${common[@]}" -i sft -a SYNTHETIC \
    -x "$EVAL_EXAMPLES" -m "$MAX_NEW_TOKENS" --forbid_bare --label=control_forbid_bare
  reinforce rl_random --reward_control=random
  need control_random_reward after=rl_random ranks scripts.chat_eval "${common[@]/#--model_tag=*/--model_tag=$MODEL_TAG-random}" \
    -i rl -a SYNTHETIC -x "$EVAL_EXAMPLES" -m "$MAX_NEW_TOKENS" --compare="sft:$MODEL_TAG" --label=control_random_reward
fi

# The report is written every time: it costs seconds and reads what all stages left.
need report after=chat_eval_rl single nanochat.report generate "$RUN"
if [ -z "${DRY_RUN:-}" ]; then
  "$PYTHON" -m nanochat.report summarize "$RUN"
  printf '== all stages finished, %d min in this sitting; report: %s\n' $((SECONDS / 60)) "$PWD/report.md"
fi
