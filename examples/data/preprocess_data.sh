#!/usr/bin/env bash
# Convert a dataset that a file of configs/datasets/ describes.
#
#   bash examples/data/preprocess_data.sh minimind_sft                        # configs/datasets/minimind_sft.yaml
#   bash examples/data/preprocess_data.sh minimind_sft --seq-length 512       # flags win over the file
#   bash examples/data/preprocess_data.sh my/own.yaml
#
# Paths in those files are relative to the directory you are in. common.sh has the settings of Python.
source "$(dirname "${BASH_SOURCE[0]}")/../mcore/minimind/common.sh"

NAME=${1:-}
CONFIG=$ROOT/configs/datasets/$NAME.yaml
[ -f "$CONFIG" ] || CONFIG=$NAME
[ -f "$CONFIG" ] || fail "no dataset ${NAME:-(none given)}; configs/datasets has $(cd "$ROOT/configs/datasets" && printf '%s ' *.yaml)"
shift
exec "$PYTHON" "$ROOT/preprocess_data.py" --config "$CONFIG" "$@"
