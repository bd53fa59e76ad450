#!/usr/bin/env bash
# Complete prompts with a model in any format: a Megatron checkpoint, a Hugging Face directory, a .pth.
#
#   LOAD_DIR=outputs/minimind3_tiny/checkpoints RAW=1 bash examples/mcore/minimind/generate_minimind_ptd.sh --prompt "A cat"
#   LOAD_DIR=minimind-3 TASK=do_sample bash examples/mcore/minimind/generate_minimind_ptd.sh --prompt-file prompts.jsonl
#
# Settings, which --help describes together with the flags:
# HF_CFG_DIR LOAD_DIR LORA_ALPHA LORA_DIR MAX_NEW_TOKENS PRECISION PROMPT_TYPE RAW SEED TASK TEMPERATURE TOKENIZER_PATH
# TOP_K TOP_P
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

run generate "$@"
