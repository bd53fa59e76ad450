#!/usr/bin/env bash
# Fine-tune all weights of a MiniMind model on conversations.
#
#   bash examples/mcore/minimind/tune_minimind_full_ptd.sh                # after pretrain_minimind_ptd.sh
#   DATA_PATH=sft_t2t_mini.jsonl TOKENIZER_PATH=tokenizer MODEL=minimind3 CKPT_LOAD_DIR=pretrained \
#       bash examples/mcore/minimind/tune_minimind_full_ptd.sh            # real input
#   STAGE=reason ...                                                      # MiniMind2's reasoning distillation
#   STAGE=distill TEACHER=minimind2-hf ...                                # a teacher: HF directory or checkpoints
#   ... --dry-run                                                         # check everything, train nothing
#
# Settings, which --help describes together with the flags:
# CKPT_LOAD_DIR PACK TEACHER
source "$(dirname "${BASH_SOURCE[0]}")/train.sh"

run tune "$@"
