#!/usr/bin/env bash
# Merge LoRA adapters into their base as a Hugging Face directory, or convert them to a PEFT adapter. Runs on a CPU.
#
#   LOAD_DIR=outputs/lora/checkpoints bash examples/mcore/minimind/ckpt_convert_minimind_mcore2hf_lora.sh
#   LOAD_DIR=base LORA_DIR=outputs/lora/checkpoints MERGE=0 \
#       bash examples/mcore/minimind/ckpt_convert_minimind_mcore2hf_lora.sh
#
# Settings, which --help describes together with the flags:
# HF_CFG_DIR LOAD_DIR LORA_ALPHA LORA_DIR LORA_R MERGE MODEL_TYPE_HF PRECISION SAVE_DIR TOKENIZER_PATH VERIFY
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

run convert mcore2hf_lora "$@"
