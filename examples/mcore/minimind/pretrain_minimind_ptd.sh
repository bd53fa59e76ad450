#!/usr/bin/env bash
# Pretrain a MiniMind model.
#
#   bash examples/mcore/minimind/pretrain_minimind_ptd.sh                 # sample corpus, tiny model, minutes on a CPU
#   DATA_PATH=pretrain_t2t_mini.jsonl TOKENIZER_PATH=tokenizer MODEL=minimind3 \
#       bash examples/mcore/minimind/pretrain_minimind_ptd.sh             # real input
#   ... --dry-run                                                         # check everything, train nothing
#
# Settings, which --help describes together with the flags:
# CKPT_LOAD_DIR DATA_PATH
source "$(dirname "${BASH_SOURCE[0]}")/train.sh"

run pretrain "$@"
