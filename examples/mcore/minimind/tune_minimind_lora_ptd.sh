#!/usr/bin/env bash
# Fine-tune a MiniMind model with LoRA adapters. The checkpoints hold only the adapters.
#
#   bash examples/mcore/minimind/tune_minimind_lora_ptd.sh                # after tune_minimind_full_ptd.sh
#   DATA_PATH=lora_medical.jsonl TOKENIZER_PATH=tokenizer MODEL=minimind3 CKPT_LOAD_DIR=tuned \
#       bash examples/mcore/minimind/tune_minimind_lora_ptd.sh            # real input
#   ... --dry-run                                                         # check everything, train nothing
#
# Settings, which --help describes together with the flags:
# CKPT_LOAD_DIR PACK
source "$(dirname "${BASH_SOURCE[0]}")/train.sh"

run lora "$@"
