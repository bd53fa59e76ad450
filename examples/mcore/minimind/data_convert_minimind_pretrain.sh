#!/usr/bin/env bash
# Convert raw text to the .bin and .idx files for pretraining. Prints their prefix, for --data-path.
#
#   bash examples/mcore/minimind/data_convert_minimind_pretrain.sh                    # the sample corpus
#   DATA_PATH=pretrain_t2t_mini.jsonl TOKENIZER_PATH=tokenizer \
#       bash examples/mcore/minimind/data_convert_minimind_pretrain.sh --dtype uint16 # yours; flags pass through
#   ... --dry-run                                                                   # check, convert nothing
#
# Settings, which --help describes together with the flags:
# DATA_PATH HANDLER_NAME JSON_KEYS OUTPUT_PREFIX TOKENIZER_PATH WORKERS
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

run data "${DATA_KIND:-text}" "$@"
