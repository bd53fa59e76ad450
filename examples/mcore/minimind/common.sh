# Sourced by every script beside it: finds or makes the Python environment, the device, the data.
# shellcheck shell=bash
#
# Settings that all scripts share, from the environment:
#   DEVICE           npu, cuda or cpu (default: the best that works)
#   BACKEND          native, or mindspeed-llm (default: mindspeed-llm on an NPU, native elsewhere)
#   REHEARSE         1: what would run on an NPU, MindSpeed-LLM's own programs, on this CPU (docs/ascend.md)
#   NPUS_PER_NODE    processes on this host, one per device (default: all devices; on a CPU 2)
#   NNODES NODE_RANK MASTER_ADDR MASTER_PORT   the same script on each host, with its own NODE_RANK
#                    (MASTER_PORT: default 29500; on a single host a free one)
#   HOSTFILE         in place of these: a file with a host a line, the same on each host
#   CANN_HOME NNAL_HOME HCCL_SOCKET_IFNAME ...   of an Ascend host: ascend.sh and minimind_mcore/hosts.py
#   DATA_DIR         where data that is made here goes (default: data/ in the repository)
set -euo pipefail

fail() {
    echo "error: $*" >&2
    exit 1
}

# require_count NAME...: each of these settings is a number of something
require_count() {
    local name
    for name in "$@"; do
        [[ ${!name} =~ ^[1-9][0-9]*$ ]] || fail "$name=${!name}: expected a whole number of 1 or more"
    done
}

# A path for programs that run in a directory of their own, as MindSpeed-LLM's do.
absolute() {
    case $1 in
        /*) printf '%s\n' "$1" ;;
        \~/*) printf '%s\n' "$HOME/${1#??}" ;;
        *) printf '%s\n' "$PWD/$1" ;;
    esac
}

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/../../.." && pwd)
source "$ROOT/requirements/lock.sh"
DATA_DIR=$(absolute "${DATA_DIR:-$ROOT/data}")
export PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}"
export CUDA_DEVICE_MAX_CONNECTIONS=1 # Megatron's overlap of communication relies on this order of kernels

if [ "${REHEARSE:-0}" != 0 ]; then
    source "$ROOT/examples/mcore/minimind/rehearse.sh"
elif [ -e /dev/davinci_manager ] && [ "${DEVICE:-npu}" = npu ]; then
    source "$ROOT/examples/mcore/minimind/ascend.sh"
fi

has_what_it_needs() {
    "$1" -c 'import importlib.util as u, sys; sys.exit(not all(map(u.find_spec, ("torch", "megatron", "transformers"))))' \
        2> /dev/null
}

# The interpreter: PYTHON, else this checkout's .venv, else one that has everything, else a new .venv.
if [ -z "${PYTHON:-}" ]; then
    if [ ! -e "$ROOT/.venv" ] && has_what_it_needs python3; then
        PYTHON=python3
    elif [ -e /dev/davinci_manager ] && [ "${DEVICE:-npu}" = npu ]; then
        fail "this is an Ascend host, and its python3 lacks torch, megatron-core or transformers: docs/install_ascend.md" \
            "installs them; set PYTHON to the one that has them, PYTHONPATH to the folder of Megatron-LM"
    else
        bash "$ROOT/requirements/install.sh"
        PYTHON=$ROOT/.venv/bin/python
    fi
fi

# kind and number of devices, e.g. "cpu 2"
read -r DEVICE DEVICES <<< "$("$PYTHON" -m minimind_mcore.platform.device)"
[ -n "$DEVICE" ] || exit 1 # the message is above
export DEVICE
BACKEND=${BACKEND:-$([ "$DEVICE" = npu ] && echo mindspeed-llm || echo native)}
[ "$BACKEND" = native ] || [ "$BACKEND" = mindspeed-llm ] || fail "BACKEND=$BACKEND: expected native or mindspeed-llm"

DRY_RUN=
for argument in "$@"; do
    [ "$argument" != --dry-run ] || DRY_RUN=1
done

# NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT; on the NPUs of several hosts the interfaces of HCCL and gloo
settings=$(NNODES=${NNODES:-} NODE_RANK=${NODE_RANK:-} MASTER_ADDR=${MASTER_ADDR:-} MASTER_PORT=${MASTER_PORT:-} \
    "$PYTHON" -m minimind_mcore.hosts "$DEVICE" ${DRY_RUN:+--dry-run})
while IFS='=' read -r name value; do
    printf -v "$name" %s "$value"
    [[ $name != HCCL_* && $name != GLOO_* ]] || export "${name?}"
done <<< "$settings"
if [ "$DEVICE" = cpu ]; then
    NPUS_PER_NODE=${NPUS_PER_NODE:-$((DEVICES > 1 ? 2 : 1))}
fi
NPUS_PER_NODE=${NPUS_PER_NODE:-$DEVICES}
require_count NPUS_PER_NODE
[ "$DEVICE" = cpu ] || [ "$NPUS_PER_NODE" -le "$DEVICES" ] ||
    fail "NPUS_PER_NODE=$NPUS_PER_NODE, but this host has $DEVICES $DEVICE devices; each process needs its own"
WORLD_SIZE=$((NNODES * NPUS_PER_NODE))

# Print a command as it could be typed.
show() {
    printf '+'
    printf ' %q' "$@"
    printf '\n'
}

# read_lines ARRAY: the lines of standard input as that array's elements. (macOS's bash has no mapfile.)
read_lines() {
    local line
    eval "$1=()"
    while IFS= read -r line; do
        [ -z "$line" ] || eval "$1+=(\"\$line\")"
    done
}

# prepare_data [flags of preprocess_data.py]: sets DATA_PREFIXES (the words of --data-path) and TOKENIZER_PATH, from
# DATA_PATH and TOKENIZER_PATH. Without DATA_PATH it makes the sample data and a tokenizer for it. What was made
# before is used again. The raw files in a blend "0.3 one 0.7 two.jsonl" are converted. In a dry run the input is
# checked and nothing made: DATA_PREFIXES stays empty where there is something to convert first.
# DATA_KIND says what is prepared: text (the default), sft or dpo. (make_sample also knows math and math-sft.)
# shellcheck disable=SC2120  # some of the scripts that source this pass no flags
prepare_data() {
    local raw=${DATA_PATH:-} output=(--cache-dir "$DATA_DIR/cache") prefixes
    DATA_PREFIXES=()
    [ -z "${TOKENIZER_PATH:-}" ] || TOKENIZER_PATH=$(absolute "$TOKENIZER_PATH")
    if [ -z "$raw" ]; then
        make_sample
        raw=$SAMPLE
    elif [ -z "${TOKENIZER_PATH:-}" ]; then
        fail "TOKENIZER_PATH is not set: give the directory of MiniMind's published tokenizer, or train one with
  $PYTHON -m minimind_mcore.preprocess.train_tokenizer --input '$raw' --output tokenizer"
    fi
    if is_dataset "$(absolute "$raw")"; then
        DATA_PREFIXES=("$(absolute "$raw")")
        return
    fi
    [ -z "${OUTPUT_PREFIX:-}" ] || output=(--output-prefix "$(absolute "$OUTPUT_PREFIX")")
    data_flags
    local command=("$PYTHON" "$ROOT/preprocess_data.py" --input "$raw"
        --tokenizer-type PretrainedFromHF --tokenizer-name-or-path "$TOKENIZER_PATH"
        --workers "${WORKERS:-$(cores)}" "${DATA_FLAGS[@]}" "${output[@]}" "$@")
    if [ -n "$DRY_RUN" ]; then
        show "${command[@]}"
        # what a dry run of this script does not make cannot be checked
        [ -e "$raw" ] || [ -n "${DATA_PATH:-}" ] || return 0
        [ -e "$TOKENIZER_PATH" ] || [ -n "${DATA_PATH:-}" ] || return 0
        command+=(--dry-run)
    fi
    prefixes=$("${command[@]}") # not in the next line, where its failure would go unnoticed
    read_lines DATA_PREFIXES <<< "$prefixes"
}

# Whether a prefix is that of a finished dataset: of text, instructions, pairs.
is_dataset() {
    [ -f "$1.idx" ] || [ -f "$1_packed_input_ids_document.idx" ] || [ -f "$1_packed_chosen_input_ids_document.idx" ]
}

# Sets DATA_FLAGS, what preprocess_data.py must know of this kind of data.
data_flags() {
    local keys=()
    case ${DATA_KIND:-text} in
        text)
            read -r -a keys <<< "${JSON_KEYS:-text}"
            DATA_FLAGS=(--handler-name "${HANDLER_NAME:-GeneralPretrainHandler}" --json-keys "${keys[@]}"
                --prepend-bos --append-eod)
            ;;
        sft)
            DATA_FLAGS=(--handler-name "${HANDLER_NAME:-MiniMindInstructionHandler}")
            [ "${PACK:-0}" = 0 ] || DATA_FLAGS+=(--pack --neat-pack)
            ;;
        dpo) DATA_FLAGS=(--handler-name "${HANDLER_NAME:-MiniMindPairwiseHandler}") ;;
        *) fail "DATA_KIND=$DATA_KIND: expected text, sft or dpo" ;;
    esac
    if [ "${DATA_KIND:-text}" != text ]; then
        DATA_FLAGS+=(
            ${SEQ_LENGTH:+--seq-length "$SEQ_LENGTH"}
            ${PROMPT_TYPE:+--prompt-type "$PROMPT_TYPE"}
            ${MAP_KEYS:+--map-keys "$MAP_KEYS"}
        )
    fi
}

# The CPU cores that this process may use.
cores() {
    if [ "$DEVICE" = cpu ]; then echo "$DEVICES"; else getconf _NPROCESSORS_ONLN; fi
}

# Makes the sample data of this kind and a tokenizer for it, unless they are there; sets SAMPLE and TOKENIZER_PATH.
make_sample() {
    local tokenizer=$DATA_DIR/tokenizer text=$DATA_DIR/sample.jsonl kind=${DATA_KIND:-text}
    local corpus=("$PYTHON" -m minimind_mcore.preprocess.corpus --output "$text" --seed 42)
    local train=("$PYTHON" -m minimind_mcore.preprocess.train_tokenizer --input "$text" --output "$tokenizer")
    local dialogues=("$PYTHON" -m minimind_mcore.preprocess.corpus --kind "$kind" --seed 42)
    SAMPLE=$text
    [ "$kind" = text ] || SAMPLE=$DATA_DIR/sample_${kind/-/_}.jsonl
    dialogues+=(--output "$SAMPLE")
    case $kind in
        sft) dialogues+=(--held-out "$DATA_DIR/sample_questions.jsonl") ;;
        math) dialogues+=(--held-out "$DATA_DIR/sample_math_unseen.jsonl") ;;
    esac
    if [ ! -f "$SAMPLE" ] || { [ -z "${TOKENIZER_PATH:-}" ] && [ ! -f "$tokenizer/tokenizer.json" ]; }; then
        [ -n "$DRY_RUN" ] || lock "$DATA_DIR/sample.lock"
        if [ -z "${TOKENIZER_PATH:-}" ] || [ "$kind" = text ]; then
            [ -f "$text" ] || run_or_show "${corpus[@]}"
        fi
        [ -n "${TOKENIZER_PATH:-}" ] || [ -f "$tokenizer/tokenizer.json" ] || run_or_show "${train[@]}"
        [ "$kind" = text ] || [ -f "$SAMPLE" ] || run_or_show "${dialogues[@]}"
        [ -n "$DRY_RUN" ] || unlock
    fi
    TOKENIZER_PATH=${TOKENIZER_PATH:-$tokenizer}
}

run_or_show() {
    if [ -n "$DRY_RUN" ]; then show "$@"; else "$@" >&2; fi
}

# convert_checkpoint FROM TO DEFAULT FLAGS...: convert LOAD_DIR, an hf or mg model, to SAVE_DIR, another, named after
# LOAD_DIR with DEFAULT behind it unless it is given.
convert_checkpoint() {
    local from=$1 to=$2 suffix=$3 name
    shift 3
    [ -n "${LOAD_DIR:-}" ] || fail "LOAD_DIR is not set: give the model to convert"
    LOAD_DIR=$(absolute "$LOAD_DIR")
    name=$(basename "$LOAD_DIR" .pth)
    [ "$name" != checkpoints ] || name=$(basename "$(dirname "$LOAD_DIR")") # outputs/MODEL/checkpoints
    SAVE_DIR=$(absolute "${SAVE_DIR:-$ROOT/outputs/$name$suffix}")
    local command=("$PYTHON" "$ROOT/convert_ckpt_v2.py" --load-model-type "$from" --save-model-type "$to"
        --load-dir "$LOAD_DIR" --save-dir "$SAVE_DIR"
        ${MODEL_TYPE_HF:+--model-type-hf "$MODEL_TYPE_HF"} ${HF_CFG_DIR:+--hf-cfg-dir "$HF_CFG_DIR"}
        ${TOKENIZER_PATH:+--tokenizer-name-or-path "$TOKENIZER_PATH"} ${PRECISION:+--params-dtype "$PRECISION"}
        ${VERIFY:+--verify "$VERIFY"} "$@")
    show "${command[@]}"
    exec "${command[@]}"
}

# layout_flags: sets LAYOUT_ARGS, the flags of the layout that TP, PP, VPP, EP, NUM_LAYER_LIST and NOOP_LAYERS ask for.
layout_flags() {
    LAYOUT_ARGS=(
        --target-tensor-parallel-size "${TP:-1}"
        --target-pipeline-parallel-size "${PP:-1}"
        --target-expert-parallel-size "${EP:-1}"
        ${VPP:+--num-layers-per-virtual-pipeline-stage "$VPP"}
        ${NUM_LAYER_LIST:+--num-layer-list "$NUM_LAYER_LIST"}
        ${NOOP_LAYERS:+--noop-layers "$NOOP_LAYERS"}
        ${CKPT_FORMAT:+--ckpt-format "$CKPT_FORMAT"}
    )
    LAYOUT_NAME="-tp${TP:-1}-pp${PP:-1}$([ "${EP:-1}" = 1 ] || echo "-ep$EP")"
}

# run_program PROGRAM FLAGS...: start one of the kit's programs on every device of this host, or show how (dry run).
# Under BACKEND=mindspeed-llm it is MindSpeed-LLM's program of that name, with the same flags.
run_program() {
    local program=$1
    shift
    local torchrun=(--nproc-per-node "$NPUS_PER_NODE" --nnodes "$NNODES" --node-rank "$NODE_RANK"
        --master-addr "$MASTER_ADDR" --master-port "$MASTER_PORT")
    local command=("$PYTHON" -m minimind_mcore.launch "${torchrun[@]}" "$ROOT/$program" "$@")
    if [ "$BACKEND" = mindspeed-llm ]; then
        command=("$PYTHON" -m minimind_mcore.mindspeed.launch "${torchrun[@]}" "$program" "$@")
    fi
    [ -z "$DRY_RUN" ] || show "${command[@]}"
    if [ -n "$DRY_RUN" ] && [ "$BACKEND" = native ]; then
        WORLD_SIZE=$WORLD_SIZE exec "$PYTHON" "$ROOT/$program" "$@"
    fi
    exec "${command[@]}"
}

# model_flags: sets MODEL_ARGS, what inference.py and evaluation.py load, from LOAD_DIR and what goes with it.
model_flags() {
    [ -n "${LOAD_DIR:-}" ] ||
        fail "LOAD_DIR is not set: give the model, a Megatron checkpoint, a Hugging Face directory or a .pth"
    MODEL_ARGS=(
        --load "$(absolute "$LOAD_DIR")"
        ${TOKENIZER_PATH:+--tokenizer-name-or-path "$(absolute "$TOKENIZER_PATH")"}
        ${HF_CFG_DIR:+--hf-cfg-dir "$(absolute "$HF_CFG_DIR")"}
        ${LORA_DIR:+--lora-load "$(absolute "$LORA_DIR")"}
        ${LORA_ALPHA:+--lora-alpha "$LORA_ALPHA"}
        ${PRECISION:+--params-dtype "$PRECISION"}
    )
}

# sampling_flags: sets SAMPLING_ARGS, how inference.py chooses tokens.
sampling_flags() {
    SAMPLING_ARGS=(
        ${MAX_NEW_TOKENS:+--max-new-tokens "$MAX_NEW_TOKENS"}
        ${TEMPERATURE:+--temperature "$TEMPERATURE"}
        ${TOP_K:+--top-k "$TOP_K"}
        ${TOP_P:+--top-p "$TOP_P"}
        ${SEED:+--seed "$SEED"}
    )
}

# run_here PROGRAM FLAGS...: run one of the kit's programs in a single process: a MiniMind fits on any device.
run_here() {
    local command=("$PYTHON" "$ROOT/$1" "${@:2}")
    [ -z "$DRY_RUN" ] || show "${command[@]}"
    exec "${command[@]}"
}
