#!/usr/bin/env bash
# Serve a model in any format to OpenAI clients: a Megatron checkpoint of any layout, a Hugging Face directory, a .pth.
#
#   LOAD_DIR=outputs/minimind3_tiny/sft/checkpoints bash examples/mcore/minimind/serve_minimind.sh
#   LOAD_DIR=minimind-3 HOST=0.0.0.0 API_KEY=secret bash examples/mcore/minimind/serve_minimind.sh
#
# LOAD_DIR         the model
# TOKENIZER_PATH   directory of its tokenizer (default: the one that it names or carries)
# LORA_DIR         adapters to merge; LORA_ALPHA where they do not say theirs
# PRECISION        bf16, fp16 or fp32 (default: fp32 on a CPU, elsewhere the model's)
# ENGINE           embedded or vllm (default: vllm where it is installed and supports the model, else embedded)
# HOST PORT        the address (an IP address or localhost) and port to listen at (default 127.0.0.1, 8998)
# API_KEY          key that clients must send; required unless HOST is a loopback address
# RAW              1: for a model that is only pretrained: /v1/completions alone
# TEMPERATURE TOP_K TOP_P   of requests that do not say (default: OpenAI's, 1.0, all, 1.0)
# Further flags of minimind-mcore serve pass through as arguments and win; --dry-run checks everything and serves nothing.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

run serve "$@"
