#!/usr/bin/env bash
# Evaluate a model in any format: C-Eval, CMMLU, MMLU, OpenBookQA, perplexity and bits per byte, from local files.
#
#   LOAD_DIR=minimind-3 TASK="ceval cmmlu" TASK_DATA_PATH="data/ceval data/cmmlu" \
#       bash examples/mcore/minimind/evaluate_minimind_ptd.sh
#   LOAD_DIR=outputs/minimind3/checkpoints TASK=perplexity TASK_DATA_PATH=held_out.jsonl \
#       bash examples/mcore/minimind/evaluate_minimind_ptd.sh
#
# LOAD_DIR         the model
# TOKENIZER_PATH   directory of its tokenizer (default: the one that it names or carries)
# TASK             ceval, cmmlu, mmlu, openbookqa, exact_match, toolcall, quality, perplexity; several are done in turn
# TASK_DATA_PATH   for each of them its folder as published; for exact_match a .jsonl of questions with an answer; for
#                  toolcall minimind, minimind-ascend, generated or a .jsonl of cases; for quality a file of prompts; for
#                  perplexity a .jsonl, .txt or .parquet, or a dataset's
#                  prefix. Paths with white space: give --task-data-path instead
# NUM_FEWSHOT      solved questions shown before each (default 0)
# BATCH            rows at a time (default 16)
# MAX_NEW_TOKENS   of a reply, for toolcall and quality (default 256)
# BACKEND          api: judge the tool calls of a server, by API_BASE_URL, API_KEY and API_MODEL, in place of LOAD_DIR
# HARNESS          tasks of lm-evaluation-harness, where that is installed
# OUTPUT_DIR       scores.json and scores.png (default outputs/NAME/evaluation)
# LORA_DIR         adapters to merge; LORA_ALPHA where they do not say theirs
# PRECISION        bf16, fp16 or fp32 (default: fp32 on a CPU, elsewhere the model's)
# Further flags of evaluation.py pass through as arguments and win; --dry-run checks everything and runs nothing.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

run evaluate "$@"
