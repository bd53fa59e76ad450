#!/usr/bin/env bash
# Align a MiniMind model with preferences (DPO); the reference is what it begins with.
#
#   bash examples/mcore/minimind/dpo_minimind_ptd.sh                      # after tune_minimind_full_ptd.sh
#   DATA_PATH=dpo.jsonl TOKENIZER_PATH=tokenizer MODEL=minimind3 CKPT_LOAD_DIR=tuned \
#       bash examples/mcore/minimind/dpo_minimind_ptd.sh                  # real input
#   ... --dpo-loss-type ipo                                               # or hinge; with BACKEND=native simpo too
#   ... --dry-run                                                         # check everything, train nothing
#
# CKPT_LOAD_DIR    the weights to begin with (default: outputs/MODEL/sft/checkpoints)
# Beta and loss are the recipe's, or --dpo-beta --dpo-loss-type --dpo-label-smoothing --pref-ftx.
# train.sh has the settings of every training.
source "$(dirname "${BASH_SOURCE[0]}")/train.sh"

run dpo "$@"
