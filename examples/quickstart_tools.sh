#!/usr/bin/env bash
# Teach the model of the quickstart to call tools, on a CPU: choose one of three, and copy its arguments.
#
#   bash examples/quickstart.sh && bash examples/quickstart_tools.sh
#
# The model of 1.7M parameters is fine-tuned on dialogues that call a tool, and on lists that it repeats. Then it gets
# 300 questions whose towns and numbers occur in no dialogue. The share of calls whose tool and arguments are exact is
# printed before and after. Ends with 1 if fewer than LEAST are exact. The same command again skips what is finished.
#
# QUICKSTART_TOOL_ITERS    iterations of the first round (default 1000)
# QUICKSTART_TOOL_MORE_ITERS   of the second, at a lower learning rate (default 700)
# QUICKSTART_TOOL_SEED     seed of the training (default 42); each seed has a directory of its own
# LEAST                    share of the calls that must be exact (default 0.8)
# OUTPUT_DIR DATA_DIR      as in quickstart.sh
# common.sh has the settings of device and processes; here DEVICE is cpu unless it is given.
export DEVICE=${DEVICE:-cpu}
source "$(dirname "${BASH_SOURCE[0]}")/mcore/minimind/common.sh"

run quickstart-tools "$@"
