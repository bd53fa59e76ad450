#!/usr/bin/env bash
# Pretrain a MiniMind model.
#
#   bash examples/mcore/minimind/pretrain_minimind_ptd.sh                 # sample corpus, tiny model, minutes on a CPU
#   DATA_PATH=pretrain_t2t_mini.jsonl TOKENIZER_PATH=tokenizer MODEL=minimind3 \
#       bash examples/mcore/minimind/pretrain_minimind_ptd.sh             # real input
#   ... --dry-run                                                         # check everything, train nothing
#
# MODEL            a name from `python -m minimind_mcore.models.presets --list`, or an HF directory or config.json
#                  (default: minimind3; for the sample corpus minimind3_tiny)
# RECIPE           a name from `python -m minimind_mcore.models.recipes --list` (default: that of MODEL's generation)
# DATA_PATH        prefix of an indexed dataset, a blend "0.3 one 0.7 two" of them, or raw .jsonl/.parquet/.txt
#                  files, directories or globs, which are converted first, once
# TOKENIZER_PATH   directory with tokenizer.json
# TP PP VPP EP CP  layout; VPP is the number of layers of a virtual stage (TP: default 1; on a CPU 2 where that fits)
# MBS GBS SEQ_LENGTH EPOCHS TRAIN_ITERS LR PRECISION(bf16|fp16|fp32)   in place of the recipe's
# CKPT_SAVE_DIR    checkpoints (default outputs/MODEL/checkpoints)
# CKPT_LOAD_DIR    where to go on from (default CKPT_SAVE_DIR: the same command resumes)
# LOG_DIR          train.log and tensorboard events (default outputs/MODEL/logs)
# SAVE_INTERVAL LOG_INTERVAL EVAL_INTERVAL EVAL_ITERS SPLIT SEED CKPT_FORMAT   as the Megatron flags
# Further Megatron flags pass through as arguments and win. For the learning rate use LR: the recipe's --min-lr follows it.
# common.sh has the settings of device and hosts.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

# given FLAG...: whether one of them is among this script's arguments
ARGUMENTS=("$@")
given() {
    local argument flag
    for argument in ${ARGUMENTS[@]+"${ARGUMENTS[@]}"}; do
        for flag in "$@"; do
            [ "${argument%%=*}" != "$flag" ] || return 0
        done
    done
    return 1
}

MODEL=${MODEL:-$([ -n "${DATA_PATH:-}" ] && echo minimind3 || echo minimind3_tiny)}
PP=${PP:-1}
EP=${EP:-1}
CP=${CP:-1}
if [ -z "${TP:-}" ]; then
    TP=1
    # On a CPU, to show tensor parallelism. Not more: the tiny models have two key-value heads.
    [ "$DEVICE" != cpu ] || [ $((WORLD_SIZE % (2 * PP * EP * CP))) != 0 ] || TP=2
fi
[ $((WORLD_SIZE % (TP * PP * CP))) = 0 ] || fail "$WORLD_SIZE processes cannot be split into TP=$TP x PP=$PP x CP=$CP"
DP=$((WORLD_SIZE / (TP * PP * CP)))
NAME=$(basename "$MODEL" .json)
[ "$NAME" != config ] || NAME=$(basename "$(dirname "$(absolute "$MODEL")")") # path/of/a/model/config.json
OUTPUT_DIR=$(absolute "${OUTPUT_DIR:-$ROOT/outputs/$NAME}")
CKPT_SAVE_DIR=$(absolute "${CKPT_SAVE_DIR:-$OUTPUT_DIR/checkpoints}")
CKPT_LOAD_DIR=$(absolute "${CKPT_LOAD_DIR:-$CKPT_SAVE_DIR}")
LOG_DIR=$(absolute "${LOG_DIR:-$OUTPUT_DIR/logs}")
PRECISION=${PRECISION:-$([ "$DEVICE" = cpu ] && echo fp32 || echo bf16)}
SPLIT=${SPLIT:-99,1,0}

# One source of truth each: the presets for the model, the recipes for the hyper-parameters. Both print a word a line.
printed=$("$PYTHON" -m minimind_mcore.models.presets "$MODEL")
read_lines MODEL_ARGS <<< "$printed"
prepare_data # without "$@": those are flags of the training
DATA_PATH_ARGS=()
LENGTH=()
if [ "${#DATA_PREFIXES[@]}" != 0 ]; then
    DATA_PATH_ARGS=(--data-path "${DATA_PREFIXES[@]}")
    LENGTH=(--split "$SPLIT" --data "${DATA_PREFIXES[@]}")
fi
[ -z "${TRAIN_ITERS:-}" ] || LENGTH=(--train-iters "$TRAIN_ITERS")
! given --train-iters --train-samples || LENGTH=()
printed=$("$PYTHON" -m minimind_mcore.models.recipes ${RECIPE:+"$RECIPE"} --model "$MODEL" --data-parallel-size "$DP" \
    ${MBS:+--micro-batch-size "$MBS"} ${GBS:+--global-batch-size "$GBS"} ${SEQ_LENGTH:+--seq-length "$SEQ_LENGTH"} \
    ${EPOCHS:+--epochs "$EPOCHS"} ${LR:+--lr "$LR"} ${LENGTH[@]+"${LENGTH[@]}"})
read_lines RECIPE_ARGS <<< "$printed"

PARALLEL_ARGS=(
    --tensor-model-parallel-size "$TP"
    --pipeline-model-parallel-size "$PP"
    ${VPP:+--num-layers-per-virtual-pipeline-stage "$VPP"}
    --expert-model-parallel-size "$EP"
    --context-parallel-size "$CP"
    --sequence-parallel
    --use-distributed-optimizer
)
DATA_ARGS=(
    ${DATA_PATH_ARGS[@]+"${DATA_PATH_ARGS[@]}"}
    --split "$SPLIT"
    --tokenizer-type PretrainedFromHF
    --tokenizer-name-or-path "$TOKENIZER_PATH"
)
CKPT_ARGS=(
    --save "$CKPT_SAVE_DIR"
    --load "$CKPT_LOAD_DIR"
    --save-interval "${SAVE_INTERVAL:-1000}"
    --ckpt-format "${CKPT_FORMAT:-torch}"
)
LOG_ARGS=(
    --log-interval "${LOG_INTERVAL:-10}"
    --eval-interval "${EVAL_INTERVAL:-100}"
    --eval-iters "${EVAL_ITERS:-5}"
    --tensorboard-dir "$LOG_DIR/tensorboard"
)
NATIVE_ARGS=()
if [ "$BACKEND" = native ]; then
    NATIVE_ARGS=(--output-dir "$OUTPUT_DIR" --log-file "$LOG_DIR/train.log")
    [ "$DEVICE" != cpu ] || NATIVE_ARGS+=(--num-workers 0) # the cores are for training
fi
if [ -n "$DRY_RUN" ] && [ "${#DATA_PREFIXES[@]}" = 0 ]; then
    NATIVE_ARGS+=(--data-pending)
fi
[ "$PRECISION" = fp32 ] || given --bf16 --fp16 || PARALLEL_ARGS+=("--$PRECISION")

run_program pretrain_gpt.py "${MODEL_ARGS[@]}" "${RECIPE_ARGS[@]}" \
    --transformer-impl local --use-flash-attn --use-fused-rmsnorm --use-fused-swiglu --use-fused-rotary-pos-emb \
    --seed "${SEED:-42}" \
    "${PARALLEL_ARGS[@]}" "${DATA_ARGS[@]}" "${CKPT_ARGS[@]}" "${LOG_ARGS[@]}" \
    ${NATIVE_ARGS[@]+"${NATIVE_ARGS[@]}"} "$@"
