# Sourced by common.sh on an Ascend host: CANN's environment, and how HCCL and torch_npu shall behave.
# shellcheck shell=bash
#
#   CANN_HOME            CANN's toolkit (default: cann, else ascend-toolkit as before CANN 8.5, in /usr/local/Ascend,
#                        else in ~/Ascend)
#   NNAL_HOME            its nnal/atb operators, if installed (default nnal/atb beside it)
#   HCCL_CONNECT_TIMEOUT seconds to wait for the other ranks at the start (default 1800)
#   HCCL_EXEC_TIMEOUT    seconds to wait for them later (default 1800)

# CANN's scripts use variables that are not set, and look at their arguments.
source_cann() {
    set +u
    # shellcheck disable=SC1090
    source "$1" ""
    set -u
}

# Where its installer puts it.
find_cann() {
    local place
    for place in /usr/local/Ascend/cann /usr/local/Ascend/ascend-toolkit "${HOME:-}/Ascend/cann" \
        "${HOME:-}/Ascend/ascend-toolkit"; do
        [ ! -f "$place/set_env.sh" ] || break
        place=/usr/local/Ascend/cann
    done
    echo "$place"
}

CANN_HOME=${CANN_HOME:-$(find_cann)}
NNAL_HOME=${NNAL_HOME:-$(dirname "$CANN_HOME")/nnal/atb}
[ -f "$CANN_HOME/set_env.sh" ] ||
    fail "found no $CANN_HOME/set_env.sh: set CANN_HOME to the folder of CANN's toolkit (docs/install_ascend.md installs it)"
source_cann "$CANN_HOME/set_env.sh"
[ ! -f "$NNAL_HOME/set_env.sh" ] || source_cann "$NNAL_HOME/set_env.sh"
export HCCL_CONNECT_TIMEOUT=${HCCL_CONNECT_TIMEOUT:-1800} HCCL_EXEC_TIMEOUT=${HCCL_EXEC_TIMEOUT:-1800}
# As MindSpeed-LLM's own scripts: two queues of operators, processes near their NPU, memory that grows in place.
export TASK_QUEUE_ENABLE=${TASK_QUEUE_ENABLE:-2} CPU_AFFINITY_CONF=${CPU_AFFINITY_CONF:-2}
export PYTORCH_NPU_ALLOC_CONF=${PYTORCH_NPU_ALLOC_CONF:-expandable_segments:True}
