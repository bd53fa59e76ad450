#!/usr/bin/env bash
# Conversations to the token ids and labels that fine-tuning reads; prints their common prefix, for --data-path.
#
#   bash examples/mcore/minimind/data_convert_minimind_instruction.sh                 # the sample dialogues
#   DATA_PATH=sft_t2t_mini.jsonl TOKENIZER_PATH=tokenizer SEQ_LENGTH=768 \
#       bash examples/mcore/minimind/data_convert_minimind_instruction.sh --pack --neat-pack # yours; flags pass through
#   ... --dry-run                                          # check, convert nothing
#
# DATA_PATH        files, directories or globs of .jsonl, .json, .parquet (.gz, .zst), separated by commas
# TOKENIZER_PATH   directory with tokenizer.json and a chat template; the sample gets one trained on the sample corpus
# SEQ_LENGTH       the most tokens of a sample (default: no limit); what is cut or left out is counted
# PACK             1: as `--pack --neat-pack`
# HANDLER_NAME     MiniMindInstructionHandler (default: sft, reason, tool calls), AlpacaStyleInstructionHandler,
#                  SharegptStyleInstructionHandler, OpenAIInstructionHandler; MiniMindPromptHandler, MiniMindAgentHandler;
#                  General-, BelleMultiTurn-, LeetcodePythonInstructionHandler, which have one fixed prompt
# PROMPT_TYPE, MAP_KEYS   as MindSpeed-LLM's --prompt-type and --map-keys; by default the tokenizer's own chat template
# OUTPUT_PREFIX    where to write (default: a name by content in DATA_DIR/cache)
# WORKERS          processes
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

run data sft "$@"
