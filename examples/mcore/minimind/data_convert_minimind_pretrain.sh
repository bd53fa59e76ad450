#!/usr/bin/env bash
# Raw text to the .bin/.idx pair that pretraining reads; prints its prefix. A second run finds the first one's result.
#
#   bash examples/mcore/minimind/data_convert_minimind_pretrain.sh                    # the sample corpus
#   DATA_PATH=pretrain_t2t_mini.jsonl TOKENIZER_PATH=tokenizer \
#       bash examples/mcore/minimind/data_convert_minimind_pretrain.sh --dtype uint16 # yours; flags pass through
#   ... --dry-run                                                                   # check, convert nothing
#
# DATA_PATH        files, directories or globs of .jsonl, .json, .parquet, .txt (.gz, .zst), separated by commas
# TOKENIZER_PATH   directory with tokenizer.json; the sample corpus gets one trained on it
# OUTPUT_PREFIX    where to write (default: a name by content in DATA_DIR/cache)
# JSON_KEYS, HANDLER_NAME, WORKERS   as the flags of preprocess_data.py
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

run data "${DATA_KIND:-text}" "$@"
