#!/usr/bin/env bash
# Align a MiniMind model with preferences (DPO). The reference has the initial weights.
#
#   bash examples/mcore/minimind/dpo_minimind_ptd.sh                      # after tune_minimind_full_ptd.sh
#   DATA_PATH=dpo.jsonl TOKENIZER_PATH=tokenizer MODEL=minimind3 CKPT_LOAD_DIR=tuned \
#       bash examples/mcore/minimind/dpo_minimind_ptd.sh                  # real input
#   ... --dpo-loss-type ipo                                               # or hinge; with BACKEND=native simpo too
#   ... --dry-run                                                         # check everything, train nothing
#
# Settings, which --help describes together with the flags:
# CKPT_LOAD_DIR
source "$(dirname "${BASH_SOURCE[0]}")/train.sh"

run dpo "$@"
