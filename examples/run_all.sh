#!/usr/bin/env bash
# Run the stages from data to a served model, each by the kit's own command.
#
#   bash examples/run_all.sh --sample all serve      # sample data and a tiny model, on a CPU, in minutes
#   bash examples/run_all.sh --dry-run zero          # check every stage and run nothing
#   bash examples/run_all.sh zero                    # MiniMind-3 from downloads to scores
#   bash examples/run_all.sh --model minimind2 --data reason=FILE all serve
#
# A finished stage is skipped if its inputs, settings and outputs are the same. An interrupted stage continues from its
# checkpoint: give the same command again. --help lists stages, presets and options.
#
# OUTPUT_DIR       checkpoints, scores and report (default outputs/run/MODEL; with --sample outputs/quickstart)
# DATA_DIR         data files (default dataset; with --sample data/quickstart)
# TOKENIZER_PATH   directory with tokenizer.json (default: MiniMind's, which the stage download gets)
# common.sh has the settings of device and processes, `minimind-mcore pretrain --help` those of training.
source "$(dirname "${BASH_SOURCE[0]}")/mcore/minimind/common.sh"

run run "$@"
