#!/usr/bin/env bash
# Teach the quickstart's model to call tools, on a CPU: to choose one of three tools, and to copy its arguments.
#
#   bash examples/quickstart.sh && bash examples/quickstart_tools.sh
#
# The model is fine-tuned on dialogues that call a tool, and on lists to repeat. The 300 test questions use towns and
# numbers that occur in no training text. The share of exact calls is printed before and after. The exit status is 1 if this
# share is below LEAST. Run the same command again to skip finished stages.
#
# QUICKSTART_TOOL_ITERS    iterations of the first round (default 700)
# QUICKSTART_TOOL_MORE_ITERS   iterations of the second round, at a lower learning rate (default 400)
# QUICKSTART_TOOL_SEED     seed of the training (default 42); each seed has its own directory
# LEAST                    required share of exact calls (default 0.8)
# OUTPUT_DIR DATA_DIR      as in quickstart.sh
# common.sh has the settings of device and processes; here DEVICE is cpu unless it is given.
export DEVICE=${DEVICE:-cpu}
source "$(dirname "${BASH_SOURCE[0]}")/mcore/minimind/common.sh"

run quickstart-tools "$@"
