# Sourced by every script that trains.
# shellcheck shell=bash
#
# Settings of every training, which --help of the scripts describes together with the flags:
# CKPT_FORMAT CKPT_SAVE_DIR CP DATA_PATH EP EPOCHS EVAL_INTERVAL EVAL_ITERS GBS LOG_DIR LOG_INTERVAL LR MBS MODEL
# OUTPUT_DIR PP PRECISION RECIPE ROUTER_WEIGHT SAVE_INTERVAL SEED SEQ_LENGTH SPLIT TOKENIZER_PATH TP TRAIN_ITERS VPP
# common.sh has the settings of device and hosts.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
