#!/usr/bin/env bash
# A Megatron checkpoint to a Hugging Face directory, or to MiniMind's own form.
#
#   LOAD_DIR=outputs/minimind3_tiny/checkpoints bash examples/mcore/minimind/ckpt_convert_minimind_mcore2hf.sh
#   LOAD_DIR=outputs/minimind3/checkpoints SAVE_DIR=out/full_sft_768.pth \
#       bash examples/mcore/minimind/ckpt_convert_minimind_mcore2hf.sh             # for MiniMind's eval_llm.py
#
# LOAD_DIR         a checkpoint of any layout, torch or torch_dist
# SAVE_DIR         the directory (default outputs/NAME-hf), or a file ending in .pth
# FORMAT           hf (default: loads with plain transformers) or minimind
# MODEL_TYPE_HF    a name to check the model against: minimind3, minimind2_moe, qwen3, qwen3-moe, qwen2-moe, llama2, ...
# HF_CFG_DIR       directory with config.json and tokenizer, where the source has none
# TOKENIZER_PATH   directory of the tokenizer, to go with the result
# PRECISION        fp32, bf16 or fp16 (default: the source's)
# PAD_HEAD_DIM     128: pad the heads with zeros, for vLLM on an NPU (docs/vllm.md)
# VERIFY           logits: also run both models and compare
# Further flags of convert_ckpt_v2.py pass through as arguments and win; --dry-run checks everything and writes nothing.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

run convert mcore2hf "$@"
