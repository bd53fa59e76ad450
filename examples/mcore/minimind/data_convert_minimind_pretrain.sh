#!/usr/bin/env bash
# Raw text to the .bin/.idx pair that pretraining reads; prints its prefix. A second run finds the first one's result.
#
#   bash examples/mcore/minimind/data_convert_minimind_pretrain.sh                    # the sample corpus
#   DATA_PATH=pretrain_t2t_mini.jsonl TOKENIZER_PATH=tokenizer \
#       bash examples/mcore/minimind/data_convert_minimind_pretrain.sh --dtype uint16 # yours; flags pass through
#
# DATA_PATH        files, directories or globs of .jsonl, .json, .parquet, .txt (.gz, .zst), separated by commas
# TOKENIZER_PATH   directory with tokenizer.json; the sample corpus gets one trained on it
# OUTPUT_PREFIX    where to write (default: a name by content in DATA_DIR/cache)
# DATA_DIR         for everything made here (default: data/ in the repository)
# JSON_KEYS, HANDLER_NAME, WORKERS   as the flags of preprocess_data.py
set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/../../.." && pwd)
PYTHON=${PYTHON:-$([ -x "$ROOT/.venv/bin/python" ] && echo "$ROOT/.venv/bin/python" || echo python3)}
export PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}"

DATA_PATH=${DATA_PATH:-}
TOKENIZER_PATH=${TOKENIZER_PATH:-}
DATA_DIR=${DATA_DIR:-$ROOT/data}

if [ -z "$DATA_PATH" ]; then
    DATA_PATH=$DATA_DIR/sample.jsonl
    [ -f "$DATA_PATH" ] || "$PYTHON" -m minimind_mcore.preprocess.corpus --output "$DATA_PATH" --seed 42 >&2
    if [ -z "$TOKENIZER_PATH" ]; then
        TOKENIZER_PATH=$DATA_DIR/tokenizer
        [ -f "$TOKENIZER_PATH/tokenizer.json" ] ||
            "$PYTHON" -m minimind_mcore.preprocess.train_tokenizer --input "$DATA_PATH" --output "$TOKENIZER_PATH" >&2
    fi
elif [ -z "$TOKENIZER_PATH" ]; then
    echo "error: TOKENIZER_PATH is not set: give MiniMind's published tokenizer (a directory), or train one with" >&2
    echo "  $PYTHON -m minimind_mcore.preprocess.train_tokenizer --input '$DATA_PATH' --output tokenizer" >&2
    exit 1
fi

# MiniMind's pretraining format: BOS + text + EOS.
FORMAT_ARGS=(--prepend-bos --append-eod --handler-name "${HANDLER_NAME:-GeneralPretrainHandler}")
if [ -n "${OUTPUT_PREFIX:-}" ]; then
    OUTPUT_ARGS=(--output-prefix "$OUTPUT_PREFIX")
else
    OUTPUT_ARGS=(--cache-dir "$DATA_DIR/cache")
fi
read -r -a KEYS <<< "${JSON_KEYS:-text}"

"$PYTHON" "$ROOT/preprocess_data.py" \
    --input "$DATA_PATH" \
    --json-keys "${KEYS[@]}" \
    --tokenizer-type PretrainedFromHF \
    --tokenizer-name-or-path "$TOKENIZER_PATH" \
    --workers "${WORKERS:-$(getconf _NPROCESSORS_ONLN)}" \
    "${FORMAT_ARGS[@]}" "${OUTPUT_ARGS[@]}" "$@"
