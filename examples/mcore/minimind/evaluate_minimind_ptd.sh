#!/usr/bin/env bash
# Evaluate a model in any format: C-Eval, CMMLU, MMLU, OpenBookQA, perplexity and bits per byte, from local files.
#
#   LOAD_DIR=minimind-3 TASK="ceval cmmlu" TASK_DATA_PATH="data/ceval data/cmmlu" \
#       bash examples/mcore/minimind/evaluate_minimind_ptd.sh
#   LOAD_DIR=outputs/minimind3/checkpoints TASK=perplexity TASK_DATA_PATH=held_out.jsonl \
#       bash examples/mcore/minimind/evaluate_minimind_ptd.sh
#
# Settings, which --help describes together with the flags:
# BACKEND BATCH HARNESS HF_CFG_DIR LOAD_DIR LORA_ALPHA LORA_DIR MAX_NEW_TOKENS NUM_FEWSHOT OUTPUT_DIR PRECISION TASK
# TASK_DATA_PATH TOKENIZER_PATH
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

run evaluate "$@"
