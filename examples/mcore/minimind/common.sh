# Sourced by every script beside it: finds or makes the Python environment, the device, the data.
# shellcheck shell=bash
#
# Settings that all scripts share, from the environment:
#   DEVICE           npu, cuda or cpu (default: the best that works)
#   BACKEND          native, or mindspeed-llm (default: mindspeed-llm on an NPU, native elsewhere)
#   NPUS_PER_NODE    processes on this host, one per device (default: all devices; on a CPU 2)
#   NNODES NODE_RANK MASTER_ADDR MASTER_PORT   the same script on each host, with its own NODE_RANK
#   DATA_DIR         where data that is made here goes (default: data/ in the repository)
set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/../../.." && pwd)
DATA_DIR=${DATA_DIR:-$ROOT/data}
export PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}"

fail() {
    echo "error: $*" >&2
    exit 1
}

has_what_it_needs() {
    "$1" -c 'import importlib.util as u, sys; sys.exit(not all(map(u.find_spec, ("torch", "megatron", "transformers"))))' \
        2> /dev/null
}

# The interpreter: PYTHON, else this checkout's .venv, else one that has everything, else a new .venv.
if [ -z "${PYTHON:-}" ]; then
    if [ ! -e "$ROOT/.venv" ] && has_what_it_needs python3; then
        PYTHON=python3
    elif [ -e /dev/davinci_manager ] && [ "${DEVICE:-npu}" = npu ]; then
        fail "this is an Ascend host, and python3 lacks torch, megatron-core or transformers: see requirements/ascend.txt"
    else
        bash "$ROOT/requirements/install.sh"
        PYTHON=$ROOT/.venv/bin/python
    fi
fi

# kind and number of devices, e.g. "cpu 2"
read -r DEVICE DEVICES <<< "$("$PYTHON" -m minimind_mcore.device)"
[ -n "$DEVICE" ] || exit 1 # the message is above
export DEVICE
BACKEND=${BACKEND:-$([ "$DEVICE" = npu ] && echo mindspeed-llm || echo native)}
[ "$BACKEND" = native ] || [ "$BACKEND" = mindspeed-llm ] || fail "BACKEND=$BACKEND: expected native or mindspeed-llm"

NNODES=${NNODES:-1}
NODE_RANK=${NODE_RANK:-0}
[ "$NNODES" = 1 ] || [ -n "${MASTER_ADDR:-}" ] ||
    fail "NNODES=$NNODES needs MASTER_ADDR, the address of the host with NODE_RANK=0"
MASTER_ADDR=${MASTER_ADDR:-127.0.0.1}
MASTER_PORT=${MASTER_PORT:-29500}
if [ "$DEVICE" = cpu ]; then
    NPUS_PER_NODE=${NPUS_PER_NODE:-$((DEVICES > 1 ? 2 : 1))}
else
    NPUS_PER_NODE=${NPUS_PER_NODE:-$DEVICES}
fi
WORLD_SIZE=$((NNODES * NPUS_PER_NODE))

DRY_RUN=
for argument in "$@"; do
    [ "$argument" = --dry-run ] && DRY_RUN=1
done

# Print a command as it could be typed.
show() {
    printf '+'
    printf ' %q' "$@"
    printf '\n'
}

# prepare_data [flags of preprocess_data.py]: sets DATA_PREFIX and TOKENIZER_PATH from DATA_PATH and TOKENIZER_PATH.
# Without DATA_PATH it makes the sample corpus and a tokenizer for it. What was made before is used again. In a dry
# run nothing is made: DATA_PREFIX stays empty where there is something to convert first.
# shellcheck disable=SC2034,SC2120  # the scripts that source this use DATA_PREFIX; some pass no flags
prepare_data() {
    local raw=${DATA_PATH:-} format=(--prepend-bos --append-eod) output=(--cache-dir "$DATA_DIR/cache")
    DATA_PREFIX=
    if [ -z "$raw" ]; then
        raw=$DATA_DIR/sample.jsonl
        make_sample "$raw"
    elif [ -z "${TOKENIZER_PATH:-}" ]; then
        fail "TOKENIZER_PATH is not set: give the directory of MiniMind's published tokenizer, or train one with
  $PYTHON -m minimind_mcore.preprocess.train_tokenizer --input '$raw' --output tokenizer"
    fi
    if [[ $raw == *[[:space:]]* || -f $raw.idx ]]; then # a blend "0.3 one 0.7 two", or a finished dataset
        DATA_PREFIX=$raw
        return
    fi
    [ -n "${OUTPUT_PREFIX:-}" ] && output=(--output-prefix "$OUTPUT_PREFIX")
    # shellcheck disable=SC2206  # JSON_KEYS is a list of words
    local keys=(${JSON_KEYS:-text})
    local command=("$PYTHON" "$ROOT/preprocess_data.py" --input "$raw" --json-keys "${keys[@]}"
        --tokenizer-type PretrainedFromHF --tokenizer-name-or-path "$TOKENIZER_PATH"
        --handler-name "${HANDLER_NAME:-GeneralPretrainHandler}" --workers "${WORKERS:-$(getconf _NPROCESSORS_ONLN)}"
        "${format[@]}" "${output[@]}" "$@")
    if [ -n "$DRY_RUN" ]; then
        show "${command[@]}"
    else
        DATA_PREFIX=$("${command[@]}")
    fi
}

make_sample() {
    local tokenizer=$DATA_DIR/tokenizer
    local corpus=("$PYTHON" -m minimind_mcore.preprocess.corpus --output "$1" --seed 42)
    local train=("$PYTHON" -m minimind_mcore.preprocess.train_tokenizer --input "$1" --output "$tokenizer")
    [ -f "$1" ] || run_or_show "${corpus[@]}"
    [ -n "${TOKENIZER_PATH:-}" ] || [ -f "$tokenizer/tokenizer.json" ] || run_or_show "${train[@]}"
    TOKENIZER_PATH=${TOKENIZER_PATH:-$tokenizer}
}

run_or_show() {
    if [ -n "$DRY_RUN" ]; then show "$@"; else "$@" >&2; fi
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
