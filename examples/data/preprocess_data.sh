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

run data "$@"
