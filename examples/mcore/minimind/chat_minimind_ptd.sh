#!/usr/bin/env bash
# Talk to a model in any format, in several turns: in a terminal, or line by line through a pipe.
#
#   LOAD_DIR=outputs/minimind3/checkpoints bash examples/mcore/minimind/chat_minimind_ptd.sh
#   printf 'hello\nwho are you?\n' | LOAD_DIR=minimind-3 bash examples/mcore/minimind/chat_minimind_ptd.sh
#
# Settings, which --help describes together with the flags:
# HF_CFG_DIR HISTORY_TURNS LOAD_DIR LORA_ALPHA LORA_DIR MAX_NEW_TOKENS PRECISION PROMPT_TYPE RAW SEED SYSTEM TEMPERATURE
# THINKING TOKENIZER_PATH TOOLS TOP_K TOP_P
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

run chat "$@"
