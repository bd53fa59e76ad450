# Sourced by common.sh on an Ascend host: CANN's environment, and how HCCL and torch_npu shall behave.
# shellcheck shell=bash
#
#   CANN_HOME            the folder of CANN's set_env.sh (default: of the environment, if that has CANN's; else cann, or
#                        ascend-toolkit as before CANN 8.5, in /usr/local/Ascend, else in ~/Ascend)
#   NNAL_HOME            that of its nnal/atb operators (default nnal/atb beside it, if installed)
#   HCCL_CONNECT_TIMEOUT seconds to wait for the other ranks at the start (default 1800)
#   HCCL_EXEC_TIMEOUT    seconds to wait for them later (default 1800)

# CANN's scripts use variables that are not set, run commands that fail, and look at their arguments.
source_cann() {
    set +euo pipefail
    # shellcheck disable=SC1090
    source "$1" ""
    set -euo pipefail
}

# Where its installer puts it; ASCEND_TOOLKIT_HOME is what set_env.sh has set, such as ascend-toolkit/latest.
find_cann() {
    local place given=${ASCEND_TOOLKIT_HOME:-/}
    for place in "$given" "$(dirname "$given")" /usr/local/Ascend/cann /usr/local/Ascend/ascend-toolkit \
        "${HOME:-}/Ascend/cann" "${HOME:-}/Ascend/ascend-toolkit"; do
        [ ! -f "$place/set_env.sh" ] || break
        place=/usr/local/Ascend/cann
    done
    echo "$place"
}

CANN_HOME=${CANN_HOME:-$(find_cann)}
[ -f "$CANN_HOME/set_env.sh" ] || fail "found no $CANN_HOME/set_env.sh: set CANN_HOME to the folder that has it, such as" \
    "/usr/local/Ascend/cann (docs/install_ascend.md installs it)"
[ -z "${NNAL_HOME:-}" ] || [ -f "$NNAL_HOME/set_env.sh" ] ||
    fail "found no $NNAL_HOME/set_env.sh: set NNAL_HOME to the folder that has it, such as /usr/local/Ascend/nnal/atb"
NNAL_HOME=${NNAL_HOME:-$(dirname "$CANN_HOME")/nnal/atb}
source_cann "$CANN_HOME/set_env.sh"
[ ! -f "$NNAL_HOME/set_env.sh" ] || source_cann "$NNAL_HOME/set_env.sh"
export HCCL_CONNECT_TIMEOUT=${HCCL_CONNECT_TIMEOUT:-1800} HCCL_EXEC_TIMEOUT=${HCCL_EXEC_TIMEOUT:-1800}
# As MindSpeed-LLM's own scripts: two queues of operators, processes near their NPU, memory that grows in place.
export TASK_QUEUE_ENABLE=${TASK_QUEUE_ENABLE:-2} CPU_AFFINITY_CONF=${CPU_AFFINITY_CONF:-2}
export PYTORCH_NPU_ALLOC_CONF=${PYTORCH_NPU_ALLOC_CONF:-expandable_segments:True}
