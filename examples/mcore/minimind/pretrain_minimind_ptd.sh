#!/usr/bin/env bash
# Pretrain a MiniMind model.
#
#   bash examples/mcore/minimind/pretrain_minimind_ptd.sh                 # sample corpus, tiny model, minutes on a CPU
#   DATA_PATH=pretrain_t2t_mini.jsonl TOKENIZER_PATH=tokenizer MODEL=minimind3 \
#       bash examples/mcore/minimind/pretrain_minimind_ptd.sh             # real input
#   ... --dry-run                                                         # check everything, train nothing
#
# DATA_PATH        prefix of an indexed dataset, raw .jsonl/.parquet/.txt, or a blend of both: "0.3 one 0.7 two.jsonl"
#                  (without weights, "one two.jsonl", each set counts by its tokens)
# CKPT_LOAD_DIR    where to go on from; there must be a checkpoint (default CKPT_SAVE_DIR: the same command resumes)
# train.sh has the settings of every training.
source "$(dirname "${BASH_SOURCE[0]}")/train.sh"

run pretrain "$@"
