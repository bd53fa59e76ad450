#!/usr/bin/env bash
# Complete prompts with a model in any format: a Megatron checkpoint of any layout, a Hugging Face directory, a .pth.
#
#   LOAD_DIR=outputs/minimind3_tiny/checkpoints RAW=1 bash examples/mcore/minimind/generate_minimind_ptd.sh --prompt "A cat"
#   LOAD_DIR=minimind-3 TASK=do_sample bash examples/mcore/minimind/generate_minimind_ptd.sh --prompt-file prompts.jsonl
#
# LOAD_DIR         the model
# TOKENIZER_PATH   directory of its tokenizer (default: the one that it names or carries)
# TASK             greedy (default), do_sample, beam_search, beam_search_with_sampling; several are done in turn
# RAW              1: bos and the prompt, for a model that is only pretrained (default: the chat template)
# PROMPT_TYPE      a template as in preprocessing, in place of the tokenizer's own
# MAX_NEW_TOKENS TEMPERATURE TOP_K TOP_P SEED   as the flags
# LORA_DIR         adapters to merge; LORA_ALPHA where they do not say theirs
# PRECISION        bf16, fp16 or fp32 (default: fp32 on a CPU, elsewhere the model's)
# Prompts come from --prompt TEXT (again and again), --prompt-file FILE or standard input, one a line.
# Further flags of inference.py pass through as arguments and win; --dry-run checks everything and runs nothing.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

run generate "$@"
