#!/usr/bin/env bash
# Convert a Megatron checkpoint to a Hugging Face directory, or to MiniMind's own format.
#
#   LOAD_DIR=outputs/minimind3_tiny/checkpoints bash examples/mcore/minimind/ckpt_convert_minimind_mcore2hf.sh
#   LOAD_DIR=outputs/minimind3/checkpoints SAVE_DIR=out/full_sft_768.pth \
#       bash examples/mcore/minimind/ckpt_convert_minimind_mcore2hf.sh             # for MiniMind's eval_llm.py
#
# Settings, which --help describes together with the flags:
# FORMAT HF_CFG_DIR LOAD_DIR MODEL_TYPE_HF PAD_HEAD_DIM PRECISION SAVE_DIR TOKENIZER_PATH VERIFY
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

run convert mcore2hf "$@"
