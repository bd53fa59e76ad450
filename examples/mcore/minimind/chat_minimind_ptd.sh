#!/usr/bin/env bash
# Talk to a model in any format, in several turns: on a terminal, or line by line through a pipe.
#
#   LOAD_DIR=outputs/minimind3/checkpoints bash examples/mcore/minimind/chat_minimind_ptd.sh
#   printf 'hello\nwho are you?\n' | LOAD_DIR=minimind-3 bash examples/mcore/minimind/chat_minimind_ptd.sh
#
# LOAD_DIR         the model
# TOKENIZER_PATH   directory of its tokenizer (default: the one that it names or carries)
# SYSTEM           a system prompt
# TOOLS            builtin, names of built-in tools with commas between, or a JSON file: docs/tools.md. --tools is the same
# THINKING         true or false (default: as the chat template has it)
# HISTORY_TURNS    earlier questions that the model is shown (default 3)
# PROMPT_TYPE      a template as in preprocessing, in place of the tokenizer's own
# RAW              1: bos and each line by itself, for a model that is only pretrained
# MAX_NEW_TOKENS TEMPERATURE TOP_K TOP_P SEED   as the flags
# LORA_DIR         adapters to merge; LORA_ALPHA where they do not say theirs
# PRECISION        bf16, fp16 or fp32 (default: fp32 on a CPU, elsewhere the model's)
# Commands: /new begins a new conversation, /quit ends. Further flags of inference.py pass through as arguments and win;
# --dry-run checks everything and runs nothing.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

run chat "$@"
