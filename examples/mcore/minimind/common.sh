# Sourced by every script next to it: finds or makes the Python environment. `run` is the command minimind-mcore.
# shellcheck shell=bash
#
# Settings that all scripts share, from the environment:
#   DEVICE           npu, cuda or cpu (default: the best that works)
#   BACKEND          native, or mindspeed-llm (default: mindspeed-llm on an NPU, native elsewhere)
#   REHEARSE         1: what would run on an NPU, MindSpeed-LLM's own programs, on this CPU (docs/ascend.md)
#   NPUS_PER_NODE    processes on this host, one per device (default: all devices; on a CPU 2)
#   NNODES NODE_RANK MASTER_ADDR MASTER_PORT   the same script on each host, with its own NODE_RANK
#                    (MASTER_PORT: default 29500; on a single host a free one)
#   HOSTFILE         in place of these: a file with a host a line, the same on each host
#   CANN_HOME NNAL_HOME HCCL_SOCKET_IFNAME ...   of an Ascend host: ascend.sh and minimind_mcore/hosts.py
#   DATA_DIR         where data that is made here goes (default: data/ in the repository)
set -euo pipefail

fail() {
    echo "error: $*" >&2
    exit 1
}

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/../../.." && pwd)
export PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}"
export CUDA_DEVICE_MAX_CONNECTIONS=1 # Megatron's overlap of communication relies on this order of kernels

if [ "${REHEARSE:-0}" != 0 ]; then
    source "$ROOT/examples/mcore/minimind/rehearse.sh"
elif [ -e /dev/davinci_manager ] && [ "${DEVICE:-npu}" = npu ]; then
    source "$ROOT/examples/mcore/minimind/ascend.sh"
fi

has_what_it_needs() {
    "$1" -c 'import importlib.util as u, sys; sys.exit(not all(map(u.find_spec, ("torch", "megatron", "transformers"))))' \
        2> /dev/null
}

# The interpreter: PYTHON, else this checkout's .venv, else one that has everything, else a new .venv.
if [ -z "${PYTHON:-}" ]; then
    if [ ! -e "$ROOT/.venv" ] && has_what_it_needs python3; then
        PYTHON=python3
    elif [ -e /dev/davinci_manager ] && [ "${DEVICE:-npu}" = npu ]; then
        fail "this is an Ascend host, and its python3 lacks torch, megatron-core or transformers: docs/install_ascend.md" \
            "installs them; set PYTHON to the one that has them, PYTHONPATH to the folder of Megatron-LM"
    else
        bash "$ROOT/requirements/install.sh"
        PYTHON=$ROOT/.venv/bin/python
    fi
fi

# run COMMAND ...: minimind-mcore COMMAND ..., whose settings are in the environment
run() { exec "$PYTHON" -m minimind_mcore.cli "$@"; }
