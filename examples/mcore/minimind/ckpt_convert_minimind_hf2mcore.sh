#!/usr/bin/env bash
# Convert weights of MiniMind or Hugging Face to a Megatron checkpoint, for training at any layout.
#
#   LOAD_DIR=minimind-3 TP=2 PP=2 bash examples/mcore/minimind/ckpt_convert_minimind_hf2mcore.sh
#   LOAD_DIR=out/full_sft_768.pth bash examples/mcore/minimind/ckpt_convert_minimind_hf2mcore.sh
#
# Settings, which --help describes together with the flags:
# CKPT_FORMAT EP HF_CFG_DIR LOAD_DIR MODEL_TYPE_HF NOOP_LAYERS NUM_LAYER_LIST PP PRECISION SAVE_DIR TOKENIZER_PATH TP
# VERIFY VPP
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

run convert hf2mcore "$@"
