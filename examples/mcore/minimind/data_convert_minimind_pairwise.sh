#!/usr/bin/env bash
# Pairs of answers to the token ids and labels that DPO reads; prints their common prefix, for --data-path.
#
#   bash examples/mcore/minimind/data_convert_minimind_pairwise.sh                    # the sample preferences
#   DATA_PATH=dpo.jsonl TOKENIZER_PATH=tokenizer SEQ_LENGTH=1024 \
#       bash examples/mcore/minimind/data_convert_minimind_pairwise.sh                # yours; flags pass through
#   ... --dry-run                                          # check, convert nothing
#
# DATA_PATH        files, directories or globs of .jsonl, .json, .parquet (.gz, .zst), separated by commas
# TOKENIZER_PATH   directory with tokenizer.json and a chat template; the sample gets one trained on the sample corpus
# SEQ_LENGTH       the most tokens of a sample (default: no limit); what is cut or left out is counted
# HANDLER_NAME     MiniMindPairwiseHandler (default), AlpacaStylePairwiseHandler, SharegptStylePairwiseHandler
# PROMPT_TYPE, MAP_KEYS   as MindSpeed-LLM's --prompt-type and --map-keys; by default the tokenizer's own chat template
# OUTPUT_PREFIX    where to write (default: a name by content in DATA_DIR/cache)
# WORKERS          processes
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

run data dpo "$@"
