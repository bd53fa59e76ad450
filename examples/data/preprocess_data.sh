#!/usr/bin/env bash
# Convert a dataset that a file of configs/datasets/ describes.
#
#   bash examples/data/preprocess_data.sh minimind_sft                        # configs/datasets/minimind_sft.yaml
#   bash examples/data/preprocess_data.sh minimind_sft --seq-length 512       # flags win over the file
#   bash examples/data/preprocess_data.sh my/own.yaml
#
#   bash examples/data/preprocess_data.sh grpo_minimind_math                  # makes its sample problems first
#
# Paths in those files are relative to the directory you are in. common.sh has the settings of Python.
source "$(dirname "${BASH_SOURCE[0]}")/../mcore/minimind/common.sh"

NAME=${1:-}
CONFIG=$ROOT/configs/datasets/$NAME.yaml
[ -f "$CONFIG" ] || CONFIG=$NAME
[ -f "$CONFIG" ] || fail "no dataset ${NAME:-(none given)}; configs/datasets has $(cd "$ROOT/configs/datasets" && printf '%s ' *.yaml)"
shift

# The sample problems for reinforcement learning: to learn from, unseen ones, and dialogues to tune on before.
if [ "$NAME" = grpo_minimind_math ]; then
    DATA_KIND=math-sft
    make_sample
    DATA_KIND=math
    make_sample
    for part in "" _unseen; do
        "$PYTHON" "$ROOT/preprocess_data.py" --config "$CONFIG" --input "${SAMPLE%.jsonl}$part.jsonl" \
            --tokenizer-name-or-path "$TOKENIZER_PATH" --output-prefix "$DATA_DIR/$NAME$part" "$@"
    done
    exit
fi
exec "$PYTHON" "$ROOT/preprocess_data.py" --config "$CONFIG" "$@"
