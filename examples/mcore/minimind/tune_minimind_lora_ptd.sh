#!/usr/bin/env bash
# Fine-tune a MiniMind model with LoRA adapters; the checkpoints hold the adapters alone.
#
#   bash examples/mcore/minimind/tune_minimind_lora_ptd.sh                # after tune_minimind_full_ptd.sh
#   DATA_PATH=lora_medical.jsonl TOKENIZER_PATH=tokenizer MODEL=minimind3 CKPT_LOAD_DIR=tuned \
#       bash examples/mcore/minimind/tune_minimind_lora_ptd.sh            # real input
#   ... --dry-run                                                         # check everything, train nothing
#
# CKPT_LOAD_DIR    the weights to adapt (default: outputs/MODEL/sft/checkpoints)
# PACK             1: several conversations share a sequence and do not see each other; data that is converted already
#                  must have been packed then (`--pack --neat-pack`)
# Rank, alpha and targets are the recipe's, or --lora-r --lora-alpha --lora-target-modules.
# train.sh has the settings of every training.
source "$(dirname "${BASH_SOURCE[0]}")/train.sh"

run lora "$@"
