#!/usr/bin/env bash
# From nothing to a chat that answers what it has never seen, on a CPU: data, pretraining, fine-tuning, marks.
#
#   bash examples/quickstart.sh
#
# A MiniMind of 1.7M parameters (minimind3_tiny) learns two tasks: addition ("17+25=?", answer "42") and lookup
# ("Table: KD=37, QX=52. What is QX?", answer "52"). It is pretrained on bare sums and tables, fine-tuned on
# dialogues, and asked 400 questions about pairs of numbers (in either order) and keys that occur in no text and no
# dialogue. That is what a model of this size learns in minutes: it shows that every stage works, not that it knows
# anything. Ends with 1 if fewer than LEAST of the sums are right. The same command again skips what is finished.
#
# This is `minimind-mcore run --sample pretrain full_sft eval`; examples/run_all.sh has the other stages.
#
# QUICKSTART_PRETRAIN_ITERS QUICKSTART_SFT_ITERS   iterations of the stages (default 2000 and 1000)
# LEAST            share of the sums that must be right (default 0.8)
# OUTPUT_DIR       default outputs/quickstart; delete it to begin anew
# DATA_DIR         default data/quickstart
# common.sh has the settings of device and processes; here DEVICE is cpu unless it is given.
export DEVICE=${DEVICE:-cpu}
source "$(dirname "${BASH_SOURCE[0]}")/mcore/minimind/common.sh"

export LEAST=${LEAST:-0.8}
run run --sample pretrain full_sft eval "$@"
