#!/usr/bin/env bash
# Convert conversations to the token ids and labels for fine-tuning. Prints their prefix, for --data-path.
#
#   bash examples/mcore/minimind/data_convert_minimind_instruction.sh                 # the sample dialogues
#   DATA_PATH=sft_t2t_mini.jsonl TOKENIZER_PATH=tokenizer SEQ_LENGTH=768 \
#       bash examples/mcore/minimind/data_convert_minimind_instruction.sh --pack --neat-pack # yours; flags pass through
#   ... --dry-run                                          # check, convert nothing
#
# Settings, which --help describes together with the flags:
# DATA_PATH HANDLER_NAME MAP_KEYS OUTPUT_PREFIX PACK PROMPT_TYPE SEQ_LENGTH TOKENIZER_PATH WORKERS
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

run data sft "$@"
