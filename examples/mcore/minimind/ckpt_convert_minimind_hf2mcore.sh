#!/usr/bin/env bash
# Weights of MiniMind or Hugging Face to a Megatron checkpoint, for training at any layout.
#
#   LOAD_DIR=minimind-3 TP=2 PP=2 bash examples/mcore/minimind/ckpt_convert_minimind_hf2mcore.sh
#   LOAD_DIR=out/full_sft_768.pth bash examples/mcore/minimind/ckpt_convert_minimind_hf2mcore.sh
#
# LOAD_DIR         a Hugging Face directory (MiniMind's own form, Llama, Qwen3, Qwen3-MoE, Qwen2-MoE), or a .pth
# SAVE_DIR         the checkpoint (default outputs/NAME-mcore-tpT-ppP)
# TP PP EP         layout of the result (default 1)
# VPP              layers of a virtual pipeline stage
# NUM_LAYER_LIST   layers of each stage, such as 3,5; NOOP_LAYERS places of the pipeline without a layer, such as 7
# CKPT_FORMAT      torch (default: MindSpeed-LLM's layout) or torch_dist
# MODEL_TYPE_HF    a name to check the model against: minimind3, minimind2_moe, qwen3, qwen3-moe, qwen2-moe, llama2, ...
# HF_CFG_DIR       directory with config.json and tokenizer, where the source has none
# TOKENIZER_PATH   directory of the tokenizer, to go with the result
# PRECISION        fp32, bf16 or fp16 (default: the source's)
# VERIFY           logits: also run both models and compare
# Further flags of convert_ckpt_v2.py pass through as arguments and win; --dry-run checks everything and writes nothing.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

run convert hf2mcore "$@"
