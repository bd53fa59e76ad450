#!/usr/bin/env bash
# Makes .venv-rehearsal, in which MindSpeed-LLM's own programs run on this CPU (REHEARSE=1, see docs/ascend.md), and with
# `rl` .venv-rehearsal-rl, which adds what MindSpeed-RL imports. Run again, it does only what has changed; the scripts call it.
#
#   MINDSPEED_LLM_HOME=... MINDSPEED_HOME=... MEGATRON_HOME=... bash requirements/rehearse.sh [rl]
#
# MINDSPEED_LLM_HOME  MindSpeed-LLM's sources, v26.1.0 (default: beside this checkout, then /workspace/MindSpeed-LLM)
# MINDSPEED_HOME      MindSpeed's, 26.1.0_core_r0.12.1 (default: beside MindSpeed-LLM)
# MEGATRON_HOME       Megatron-LM's, core_v0.12.1 (default: beside MindSpeed-LLM)
# PYTHON              the interpreter to make it with (3.10 to 3.12; default python3)
# TORCH_INDEX_URL     where the CPU build of torch is, unless pip's own index has it
#
# Nothing is written to the sources: Megatron-LM, which compiles a helper in its own folder, is copied.
set -euo pipefail
HERE=$(dirname "${BASH_SOURCE[0]}")
source "$HERE/venv.sh"
source "$HERE/lock.sh"
source "$HERE/sources.sh"
find_sources
cd "$HERE/.."
[ -n "$MINDSPEED_HOME" ] || fail "found no MindSpeed in $(dirname "$MINDSPEED_LLM_HOME"); set MINDSPEED_HOME to its sources"
[ -n "$MEGATRON_HOME" ] || fail "found no Megatron-LM in $(dirname "$MINDSPEED_LLM_HOME"); set MEGATRON_HOME to its sources"

if [ "${1:-}" = rl ]; then
    bash requirements/rehearse.sh
    BASE=$PWD/.venv-rehearsal VENV=.venv-rehearsal-rl
    INPUTS=(requirements/rehearsal-rl.txt requirements/rehearsal.txt)
    begin
    PYTHON=$BASE/bin/python make_venv 12
    packages() { "$1" -c "import sysconfig; print(sysconfig.get_path('purelib'))"; }
    packages "$BASE/bin/python" > "$(packages "$VENV/bin/python")/rehearsal.pth" # torch and all else is there already
    say requirements/rehearsal-rl.txt
    pip install -qq -r requirements/rehearsal-rl.txt
    record
    exit
fi

VENV=.venv-rehearsal
INPUTS=(requirements/rehearsal.txt "$MEGATRON_HOME/megatron/core/package_info.py")
begin
make_venv 12 # as numpy 1.26 has it

PIN=$(sed -n 's/^torch==//p' requirements/rehearsal.txt)
if [ "$(uname -s)" = Linux ] && ! "$VENV/bin/python" -c "import torch; assert torch.__version__ == '$PIN+cpu'" 2> /dev/null; then
    cpu_torch "$PIN"
fi
say requirements/rehearsal.txt
pip install -qq -r requirements/rehearsal.txt
say "a copy of $MEGATRON_HOME/megatron"
rm -rf "$VENV/megatron-lm"
mkdir -p "$VENV/megatron-lm"
cp -R "$MEGATRON_HOME/megatron" "$VENV/megatron-lm/megatron"
record
