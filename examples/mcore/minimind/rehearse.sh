# Sourced by common.sh under REHEARSE=1: MindSpeed-LLM's own programs on this CPU (MindSpeed-RL's where REHEARSAL=rl), with
# a stand-in for torch_npu, to find mistakes before an NPU is there (docs/ascend.md). It says nothing about speed, memory
# or an NPU's rounding.
# shellcheck shell=bash
# shellcheck disable=SC2034  # PYTHON and BACKEND are common.sh's

source "$ROOT/requirements/sources.sh"
find_sources
PYTHON="${PYTHON:-}" bash "$ROOT/requirements/rehearse.sh" ${REHEARSAL:+"$REHEARSAL"}
VENV=$ROOT/.venv-rehearsal${REHEARSAL:+-$REHEARSAL}
MEGATRON=$ROOT/.venv-rehearsal/megatron-lm
if [ "${REHEARSAL:-}" = rl ]; then
    export MEGATRON_HOME=$MEGATRON # Ray's workers get it, and compile in it
    export NUM_CPUS=${NUM_CPUS:-64} # Ray waits for ever for the cores of an Ascend host
fi
STAND_IN=$ROOT/rehearsal/minimind_mcore_rehearsal
PYTHON=$VENV/bin/python
PATH=$VENV/bin:$PATH # the compilation of Megatron-LM's helpers asks python3 for its headers
export DEVICE=npu NPUS_PER_NODE=${NPUS_PER_NODE:-2}
export PYTHONPATH="${REHEARSAL:+$STAND_IN/$REHEARSAL:}$STAND_IN/python:$MINDSPEED_HOME:$MEGATRON:$PYTHONPATH"
export PYTHONPYCACHEPREFIX=$VENV/pycache # nothing is written to the sources
export TORCH_EXTENSIONS_DIR=$VENV/torch_extensions # MindSpeed removes this folder
export HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 TOKENIZERS_PARALLELISM=false
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
echo "rehearsal: on the CPU, with a stand-in for torch_npu" >&2
