#!/usr/bin/env bash
# LoRA adapters merged into their base, as a Hugging Face directory; or by themselves, as PEFT has them. On a CPU.
#
#   LOAD_DIR=outputs/lora/checkpoints bash examples/mcore/minimind/ckpt_convert_minimind_mcore2hf_lora.sh
#   LOAD_DIR=base LORA_DIR=outputs/lora/checkpoints MERGE=0 \
#       bash examples/mcore/minimind/ckpt_convert_minimind_mcore2hf_lora.sh
#
# LOAD_DIR         a Megatron checkpoint: the base, or base and adapters
# LORA_DIR         the adapters, where they are elsewhere: a Megatron checkpoint, or MiniMind's LoRA .pth
# LORA_R LORA_ALPHA   as in training; checked against the checkpoint, needed where it does not say
# MERGE            1 (default) merges, 0 writes a PEFT adapter
# SAVE_DIR         the directory (default outputs/NAME-hf, or outputs/NAME-peft)
# MODEL_TYPE_HF    a name to check the model against: minimind3, minimind2_moe, qwen3, qwen3-moe, qwen2-moe, llama2, ...
# HF_CFG_DIR       directory with config.json and tokenizer, where the source has none
# TOKENIZER_PATH   directory of the tokenizer, to go with the result
# PRECISION        fp32, bf16 or fp16 (default: the source's)
# VERIFY           logits: also run both models and compare
# Further flags of convert_ckpt_v2.py pass through as arguments and win; --dry-run checks everything and writes nothing.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

run convert mcore2hf_lora "$@"
