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

# shellcheck source=scripts/stages.sh
source scripts/stages.sh

# Every node must see the folder that node 0 writes to.
if [ "$NNODES" -gt 1 ] && [ -z "${DRY_RUN:-}" ]; then
  mkdir -p "$NANOCHAT_BASE_DIR"
  [ "$NODE_RANK" != 0 ] || date +%s%N >"$NANOCHAT_BASE_DIR/.nodes"
  seen=$(agree nodes "$(cat "$NANOCHAT_BASE_DIR/.nodes" 2>/dev/null)") || exit
  if [ "$(cat "$NANOCHAT_BASE_DIR/.nodes" 2>/dev/null)" != "$seen" ]; then
    why="node $NODE_RANK does not see node 0's NANOCHAT_BASE_DIR=$NANOCHAT_BASE_DIR; put it on shared storage"
    "$PYTHON" -m scripts.nodes leave -- "$why"
    die "$why"
  fi
  # What one node finds, the data or the network, must count for all: their commands have to be the same.
  AQUA_ROWS=$(agree aqua "$AQUA_ROWS") || exit
  NETWORK=$(agree network "$NETWORK") || exit
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
  --save_every="$SAVE_EVERY" --eval_every="$EVAL_EVERY" --eval_tokens="$EVAL_TOKENS" ${more[@]+"${more[@]}"}
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
  --synthetic_examples="$SYNTHETIC_EXAMPLES" --program_examples="$PROGRAM_EXAMPLES" \
  --other_examples="$OTHER_EXAMPLES" \
  --save_every="$SAVE_EVERY" --eval_every="$EVAL_EVERY" --eval_tokens="$EVAL_TOKENS" ${more[@]+"${more[@]}"}
evaluate mid after=mid_train

fine_tune() { # fine_tune NAME flags...
  extra "$EXTRA_CHAT_SFT"
  need "$1" after=mid_train ranks scripts.chat_sft "${common[@]}" "${rates[@]}" --num_iterations="$SFT_ITERATIONS" \
    --total_batch_size="$SFT_BATCH_TOKENS" --device_batch_size="$SFT_DEVICE_BATCH_SIZE" \
    --aqua_train_examples="$AQUA_TRAIN_EXAMPLES" --aqua_val_examples="$AQUA_VAL_EXAMPLES" \
    --synthetic_examples="$SYNTHETIC_EXAMPLES" --program_examples="$PROGRAM_EXAMPLES" \
    --other_examples="$OTHER_EXAMPLES" \
    --save_every="$SAVE_EVERY" --eval_every="$EVAL_EVERY" "${@:2}" ${more[@]+"${more[@]}"}
}
fine_tune chat_sft
evaluate sft after=chat_sft

reinforce() { # reinforce NAME after=STAGES flags...
  extra "$EXTRA_CHAT_RL"
  need "$1" "$2" ranks scripts.chat_rl "${common[@]}" --dataset="${RL_DATASET:-AQUA}" --max_steps="$RL_STEPS" \
    --examples_per_step="$EXAMPLES_PER_STEP" --num_samples="$NUM_SAMPLES" --max_new_tokens="$MAX_NEW_TOKENS" \
    --temperature="$TEMPERATURE" --learning_rate="$RL_LEARNING_RATE" --device_batch_size="$RL_DEVICE_BATCH_SIZE" \
    --eval_every="$RL_EVAL_EVERY" --eval_examples="$RL_EVAL_EXAMPLES" --save_every="$RL_SAVE_EVERY" \
    --kl_every="$KL_EVERY" --attn_every="$ATTN_EVERY" "${@:3}" ${more[@]+"${more[@]}"}
}
reinforce chat_rl after=chat_sft
evaluate rl after=chat_rl,chat_eval_sft --compare=sft

control() { # control NAME after=STAGES -i SOURCE flags...: ask what RL was evaluated on
  need "control_$1" "$2" ranks scripts.chat_eval "${common[@]}" -a SYNTHETIC -x "$EVAL_EXAMPLES" -m "$MAX_NEW_TOKENS" \
    --label="control_$1" "${@:3}"
}

# Controls: how much of a gain is only a choice of style, and what is learnt from rewards that mean nothing.
if [ "$CONTROLS" -ge 1 ]; then
  control forbid_bare after=chat_sft -i sft --forbid_bare
  reinforce rl_random after=chat_sft --reward_control=random
  control random_reward after=rl_random -i rl --model_tag="$MODEL_TAG-random"
fi

# And what RL does where there is no choice of style left: it must not lose what SFT has learnt.
if [ "$CONTROLS" -ge 2 ]; then
  fine_tune sft_worked --quality=worked --save_tag="$MODEL_TAG-worked" --label=sft_worked
  control sft_worked after=sft_worked -i sft --model_tag="$MODEL_TAG-worked"
  reinforce rl_worked after=sft_worked --model_tag="$MODEL_TAG-worked" --label=rl_worked
  control rl_worked after=rl_worked -i rl --model_tag="$MODEL_TAG-worked"
fi

# The report is written every time: it costs seconds and reads what all stages left.
need report after=chat_eval_rl single nanochat.report generate "$RUN"
if [ -z "${DRY_RUN:-}" ] && [ "$NODE_RANK" = 0 ]; then
  "$PYTHON" -m nanochat.report summarize "$RUN"
  printf '== all stages finished, %d min in this sitting; report: %s\n' $((SECONDS / 60)) "$PWD/report.md"
fi
