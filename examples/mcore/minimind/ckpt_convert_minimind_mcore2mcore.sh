#!/usr/bin/env bash
# Convert a Megatron checkpoint to another layout or format. The optimizer state is not converted.
#
#   LOAD_DIR=outputs/minimind3_tiny/checkpoints TP=1 PP=2 bash examples/mcore/minimind/ckpt_convert_minimind_mcore2mcore.sh
#
# Settings, which --help describes together with the flags:
# CKPT_FORMAT EP HF_CFG_DIR LOAD_DIR MODEL_TYPE_HF NOOP_LAYERS NUM_LAYER_LIST PP PRECISION SAVE_DIR TOKENIZER_PATH TP
# VERIFY VPP
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

run convert mcore2mcore "$@"
