#!/usr/bin/env bash
# Train a tiny chat model on a CPU, and score it on unseen questions: data, pretraining, fine-tuning, evaluation.
#
#   bash examples/quickstart.sh
#
# A MiniMind with 1.7M parameters (minimind3_tiny) learns two tasks: addition ("17+25=?", answer "42") and lookup
# ("Table: KD=37, QX=52. What is QX?", answer "52"). The model is pretrained on sums and tables, and fine-tuned on
# dialogues. The 400 test questions use number pairs and keys that occur in no training text. The exit status is 1 if
# the accuracy on sums is below LEAST. Run the same command again to skip finished stages.
#
# This is `minimind-mcore run --sample pretrain full_sft eval`; examples/run_all.sh has the other stages.
#
# QUICKSTART_PRETRAIN_ITERS QUICKSTART_SFT_ITERS   iterations of the stages (default 2000 and 1000)
# LEAST            required accuracy on sums (default 0.8)
# OUTPUT_DIR       default outputs/quickstart; delete it to start again
# DATA_DIR         default data/quickstart
# common.sh has the settings of device and processes; here DEVICE is cpu unless it is given.
export DEVICE=${DEVICE:-cpu}
source "$(dirname "${BASH_SOURCE[0]}")/mcore/minimind/common.sh"

export LEAST=${LEAST:-0.8}
run run --sample pretrain full_sft eval "$@"
