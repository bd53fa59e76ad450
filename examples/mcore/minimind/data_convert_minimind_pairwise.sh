#!/usr/bin/env bash
# Convert preference pairs to the token ids and labels for DPO. Prints their prefix, for --data-path.
#
#   bash examples/mcore/minimind/data_convert_minimind_pairwise.sh                    # the sample preferences
#   DATA_PATH=dpo.jsonl TOKENIZER_PATH=tokenizer SEQ_LENGTH=1024 \
#       bash examples/mcore/minimind/data_convert_minimind_pairwise.sh                # yours; flags pass through
#   ... --dry-run                                          # check, convert nothing
#
# Settings, which --help describes together with the flags:
# DATA_PATH HANDLER_NAME MAP_KEYS OUTPUT_PREFIX PROMPT_TYPE SEQ_LENGTH TOKENIZER_PATH WORKERS
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

run data dpo "$@"
