# Sourced by every script that trains: their settings.
# shellcheck shell=bash
#
# Settings that all of them take, from the environment:
#   MODEL            a name from `python -m minimind_mcore.models.presets --list`, or an HF directory or config.json
#                    (default: minimind3; for the sample data minimind3_tiny)
#   RECIPE           a name from `python -m minimind_mcore.models.recipes --list` (default: of MODEL's generation and STAGE)
#   DATA_PATH        prefix of a finished dataset, or raw files, directories or globs, which are converted first, once
#   TOKENIZER_PATH   directory with tokenizer.json
#   TP PP VPP EP CP  layout; VPP is the number of layers of a virtual stage (TP: default 1; on a CPU 2 where that fits)
#   MBS GBS SEQ_LENGTH EPOCHS TRAIN_ITERS LR PRECISION(bf16|fp16|fp32)   in place of the recipe's
#   ROUTER_WEIGHT    normalized, softmax or straight_through: how a mixture of experts weighs its experts (docs/models.md;
#                    default: the rule of the loaded weights; in new training straight_through with one expert per token)
#   OUTPUT_DIR       default outputs/MODEL, of post-training outputs/MODEL/STAGE
#   CKPT_SAVE_DIR    checkpoints (default OUTPUT_DIR/checkpoints); the same command goes on from them
#   LOG_DIR          train.log and tensorboard events (default OUTPUT_DIR/logs)
#   SAVE_INTERVAL LOG_INTERVAL EVAL_INTERVAL EVAL_ITERS SPLIT SEED CKPT_FORMAT   as the Megatron flags
# Further Megatron flags pass through as arguments and win. For the learning rate use LR: the recipe's --min-lr follows it.
# common.sh has the settings of device and hosts.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
