#!/usr/bin/env bash
# Pretrain a MiniMind model.
#
#   bash examples/mcore/minimind/pretrain_minimind_ptd.sh                 # sample corpus, tiny model, minutes on a CPU
#   DATA_PATH=pretrain_t2t_mini.jsonl TOKENIZER_PATH=tokenizer MODEL=minimind3 \
#       bash examples/mcore/minimind/pretrain_minimind_ptd.sh             # real input
#   ... --dry-run                                                         # check everything, train nothing
#
# MODEL            a name from `python -m minimind_mcore.models.presets --list`, or an HF directory or config.json
# RECIPE           a name from `python -m minimind_mcore.models.recipes --list` (default: that of MODEL's generation)
# DATA_PATH        prefix of an indexed dataset, a blend "0.3 one 0.7 two" of them, or raw .jsonl/.parquet/.txt
#                  files, directories or globs, which are converted first, once
# TOKENIZER_PATH   directory with tokenizer.json
# TP PP VPP EP CP  layout; VPP is the number of layers of a virtual stage
# MBS GBS SEQ_LENGTH EPOCHS TRAIN_ITERS LR PRECISION(bf16|fp16|fp32)   in place of the recipe's
# CKPT_SAVE_DIR    checkpoints (default outputs/MODEL/checkpoints)
# CKPT_LOAD_DIR    where to go on from (default CKPT_SAVE_DIR: the same command resumes)
# LOG_DIR          train.log and tensorboard events (default outputs/MODEL/logs)
# SAVE_INTERVAL LOG_INTERVAL EVAL_INTERVAL EVAL_ITERS SPLIT SEED CKPT_FORMAT   as the Megatron flags
# Further Megatron flags pass through as arguments and win. common.sh has the settings of device and hosts.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

MODEL=${MODEL:-$([ "$DEVICE" = cpu ] && [ -z "${DATA_PATH:-}" ] && echo minimind3_tiny || echo minimind3)}
TP=${TP:-$([ "$DEVICE" = cpu ] && echo "$NPUS_PER_NODE" || echo 1)}
PP=${PP:-1}
EP=${EP:-1}
CP=${CP:-1}
[ $((WORLD_SIZE % (TP * PP * CP))) = 0 ] || fail "$WORLD_SIZE processes cannot be split into TP=$TP x PP=$PP x CP=$CP"
DP=$((WORLD_SIZE / (TP * PP * CP)))
OUTPUT_DIR=${OUTPUT_DIR:-$ROOT/outputs/$(basename "$MODEL" .json)}
CKPT_SAVE_DIR=${CKPT_SAVE_DIR:-$OUTPUT_DIR/checkpoints}
CKPT_LOAD_DIR=${CKPT_LOAD_DIR:-$CKPT_SAVE_DIR}
LOG_DIR=${LOG_DIR:-$OUTPUT_DIR/logs}
case $MODEL in
    *_tiny) RECIPE=${RECIPE:-tiny_pretrain} ;;
    minimind2*) RECIPE=${RECIPE:-minimind2_pretrain} ;;
    *) RECIPE=${RECIPE:-minimind3_pretrain} ;;
esac
PRECISION=${PRECISION:-$([ "$DEVICE" = cpu ] && echo fp32 || echo bf16)}

# One source of truth each: the presets for the model, the recipes for the hyper-parameters.
MODEL_ARGS=$("$PYTHON" -m minimind_mcore.models.presets "$MODEL")
prepare_data # without "$@": those are flags of the training
RECIPE_ARGS=$("$PYTHON" -m minimind_mcore.models.recipes "$RECIPE" --data-parallel-size "$DP" \
    ${DATA_PREFIX:+--data $DATA_PREFIX} ${MBS:+--micro-batch-size "$MBS"} ${GBS:+--global-batch-size "$GBS"} \
    ${SEQ_LENGTH:+--seq-length "$SEQ_LENGTH"} ${EPOCHS:+--epochs "$EPOCHS"} ${LR:+--lr "$LR"} \
    ${TRAIN_ITERS:+--train-iters "$TRAIN_ITERS"})

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
    ${DATA_PREFIX:+--data-path $DATA_PREFIX}
    --split "${SPLIT:-99,1,0}"
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
if [ -n "$DRY_RUN" ] && [ -z "$DATA_PREFIX" ]; then
    NATIVE_ARGS+=(--data-pending)
fi
[ "$PRECISION" = fp32 ] || PARALLEL_ARGS+=("--$PRECISION")

# shellcheck disable=SC2086  # one word a line, without spaces
run_program pretrain_gpt.py $MODEL_ARGS $RECIPE_ARGS \
    --transformer-impl local --use-flash-attn --use-fused-rmsnorm --use-fused-swiglu --use-fused-rotary-pos-emb \
    --seed "${SEED:-42}" \
    "${PARALLEL_ARGS[@]}" "${DATA_ARGS[@]}" "${CKPT_ARGS[@]}" "${LOG_ARGS[@]}" \
    ${NATIVE_ARGS[@]+"${NATIVE_ARGS[@]}"} "$@"
