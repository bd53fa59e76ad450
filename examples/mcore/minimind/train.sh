# Sourced by every script that trains, after it has set STAGE: what they share, as `train PROGRAM FLAGS...`.
# shellcheck shell=bash
#
# Settings that all of them take, from the environment:
#   MODEL            a name from `python -m minimind_mcore.models.presets --list`, or an HF directory or config.json
#                    (default: minimind3; for the sample data minimind3_tiny)
#   RECIPE           a name from `python -m minimind_mcore.models.recipes --list` (default: of MODEL's generation and STAGE)
#   DATA_PATH        prefix of a finished dataset, or raw files, directories or globs, which are converted first, once
#   TOKENIZER_PATH   directory with tokenizer.json
#   TP PP VPP EP CP  layout; VPP is the number of layers of a virtual stage (TP: default 1; on a CPU 2 where that fits)
#   MBS GBS SEQ_LENGTH EPOCHS TRAIN_ITERS LR PRECISION(bf16|fp16|fp32)   in place of the recipe's
#   ROUTER_WEIGHT    normalized, softmax or straight_through: how a mixture of experts weighs its experts (docs/models.md;
#                    default: the rule of the loaded weights; in new training straight_through with one expert per token)
#   OUTPUT_DIR       default outputs/MODEL, of post-training outputs/MODEL/STAGE
#   CKPT_SAVE_DIR    checkpoints (default OUTPUT_DIR/checkpoints); the same command goes on from them
#   LOG_DIR          train.log and tensorboard events (default OUTPUT_DIR/logs)
#   SAVE_INTERVAL LOG_INTERVAL EVAL_INTERVAL EVAL_ITERS SPLIT SEED CKPT_FORMAT   as the Megatron flags
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
require_count PP EP CP
if [ -z "${TP:-}" ]; then
    TP=1
    # On a CPU, to show tensor parallelism. Not more: the tiny models have two key-value heads.
    [ "$DEVICE" != cpu ] || [ $((WORLD_SIZE % (2 * PP * EP * CP))) != 0 ] || TP=2
fi
require_count TP
[ $((WORLD_SIZE % (TP * PP * CP))) = 0 ] || fail "$WORLD_SIZE processes cannot be split into TP=$TP x PP=$PP x CP=$CP"
DP=$((WORLD_SIZE / (TP * PP * CP)))
NAME=$(basename "$MODEL" .json)
[ "$NAME" != config ] || NAME=$(basename "$(dirname "$(absolute "$MODEL")")") # path/of/a/model/config.json
MODEL_DIR=$ROOT/outputs/$NAME
OUTPUT_DIR=$(absolute "${OUTPUT_DIR:-$MODEL_DIR$([ "$STAGE" = pretrain ] || echo "/$STAGE")}")
CKPT_SAVE_DIR=$(absolute "${CKPT_SAVE_DIR:-$OUTPUT_DIR/checkpoints}")
LOG_DIR=$(absolute "${LOG_DIR:-$OUTPUT_DIR/logs}")
PRECISION=${PRECISION:-$([ "$DEVICE" = cpu ] && echo fp32 || echo bf16)}
[[ $PRECISION =~ ^(bf16|fp16|fp32)$ ]] || fail "PRECISION=$PRECISION: expected bf16, fp16 or fp32"
SPLIT=${SPLIT:-99,1,0}

# One source of truth each: the presets for the model, the recipes for the hyper-parameters. Both print a word a line.
# Sets MODEL_ARGS, RECIPE_ARGS and DATA_ARGS.
prepare_run() {
    local printed data=() length=()
    local recipe=("$PYTHON" -m minimind_mcore.models.recipes ${RECIPE:+"$RECIPE"} --model "$MODEL" --stage "$STAGE"
        --data-parallel-size "$DP" ${MBS:+--micro-batch-size "$MBS"} ${GBS:+--global-batch-size "$GBS"}
        ${SEQ_LENGTH:+--seq-length "$SEQ_LENGTH"} ${EPOCHS:+--epochs "$EPOCHS"} ${LR:+--lr "$LR"}
        --split="$SPLIT") # one word: argparse takes a negative number for a flag
    printed=$("$PYTHON" -m minimind_mcore.models.presets "$MODEL")
    read_lines MODEL_ARGS <<< "$printed"
    printed=$("${recipe[@]}")
    # Conversations are converted for the length that is trained: what is longer is counted, packs are as long.
    given --seq-length || SEQ_LENGTH=$(sed -n '/^--seq-length$/{n;p;}' <<< "$printed")
    prepare_data # without "$@": those are flags of the training
    if [ "${#DATA_PREFIXES[@]}" != 0 ]; then
        data=(--data-path "${DATA_PREFIXES[@]}")
        length=(--data "${DATA_PREFIXES[@]}")
    fi
    [ -z "${TRAIN_ITERS:-}" ] || length=(--train-iters "$TRAIN_ITERS")
    ! given --train-iters --train-samples || length=()
    printed=$("${recipe[@]}" ${length[@]+"${length[@]}"})
    read_lines RECIPE_ARGS <<< "$printed"
    DATA_ARGS=(
        ${data[@]+"${data[@]}"}
        --split "$SPLIT"
        --tokenizer-type PretrainedFromHF
        --tokenizer-name-or-path "$TOKENIZER_PATH"
    )
}

# train PROGRAM FLAGS...: run one of the kit's programs with the flags of model, recipe, layout, data and logs.
train() {
    local program=$1
    shift
    prepare_run
    local parallel=(
        --tensor-model-parallel-size "$TP"
        --pipeline-model-parallel-size "$PP"
        ${VPP:+--num-layers-per-virtual-pipeline-stage "$VPP"}
        --expert-model-parallel-size "$EP"
        --context-parallel-size "$CP"
        --sequence-parallel
        --use-distributed-optimizer
    )
    [ "$PRECISION" = fp32 ] || given --bf16 --fp16 || parallel+=("--$PRECISION")
    # Megatron's default of 2^32 overflows: it is halved once in a step, and about 16 steps would train nothing.
    if given --fp16 || { [ "$PRECISION" = fp16 ] && ! given --bf16; }; then
        given --initial-loss-scale --loss-scale || parallel+=(--initial-loss-scale 65536)
    fi
    local outputs=(
        --save "$CKPT_SAVE_DIR"
        --save-interval "${SAVE_INTERVAL:-1000}"
        --ckpt-format "${CKPT_FORMAT:-torch}"
        --log-interval "${LOG_INTERVAL:-10}"
        --eval-interval "${EVAL_INTERVAL:-100}"
        --eval-iters "${EVAL_ITERS:-5}"
        --tensorboard-dir "$LOG_DIR/tensorboard"
    )
    if [ "$BACKEND" = native ]; then
        outputs+=(--output-dir "$OUTPUT_DIR" --log-file "$LOG_DIR/train.log")
        [ "$DEVICE" != cpu ] || outputs+=(--num-workers 0) # the cores are for training
    fi
    if [ -n "$DRY_RUN" ] && [ "${#DATA_PREFIXES[@]}" = 0 ]; then
        outputs+=(--data-pending)
    fi
    run_program "$program" "${MODEL_ARGS[@]}" ${ROUTER_WEIGHT:+--router-weight "$ROUTER_WEIGHT"} "${RECIPE_ARGS[@]}" \
        --transformer-impl local --use-flash-attn --use-fused-rmsnorm --use-fused-swiglu \
        --use-fused-rotary-pos-emb --seed "${SEED:-42}" \
        "${parallel[@]}" "${DATA_ARGS[@]}" "${outputs[@]}" "$@" ${ARGUMENTS[@]+"${ARGUMENTS[@]}"}
}

# post_train DEFAULT FLAGS...: run posttrain_gpt.py on the weights of CKPT_LOAD_DIR, else of DEFAULT.
post_train() {
    CKPT_LOAD_DIR=$(absolute "${CKPT_LOAD_DIR:-$1}")
    shift
    # goes on from its own checkpoints where it has been interrupted
    local begin=(--load "$CKPT_SAVE_DIR" --pretrained-checkpoint "$CKPT_LOAD_DIR")
    train posttrain_gpt.py "${begin[@]}" "$@"
}

# Sets LENGTH_ARGS: how samples fill a micro-batch. PACK=1: the data is packed; else each is as long as its longest.
length_flags() {
    LENGTH_ARGS=(--no-pad-to-seq-lengths)
    [ "${PACK:-0}" != 0 ] || return 0
    LENGTH_ARGS=(--reset-attention-mask --neat-pack)
    if [ "$BACKEND" = mindspeed-llm ] && [ -z "${MBS:-}" ] && ! given --micro-batch-size; then
        MBS=1
        echo "PACK=1: micro-batches of 1 (MBS=1), as in larger ones MindSpeed-LLM's packed samples see each other (D9);" \
            "the global batch stays as it is" >&2
    fi
}
