#!/usr/bin/env bash
# Makes .venv-rehearsal, in which MindSpeed-LLM's own programs run on this CPU (REHEARSE=1, see docs/ascend.md).
# Run again, it does only what has changed; the scripts call it.
#
#   MINDSPEED_LLM_HOME=... MINDSPEED_HOME=... MEGATRON_HOME=... bash requirements/rehearse.sh
#
# MINDSPEED_LLM_HOME  MindSpeed-LLM's sources, v26.1.0 (default: beside this checkout, then /workspace/MindSpeed-LLM)
# MINDSPEED_HOME      MindSpeed's, 26.1.0_core_r0.12.1 (default: beside MindSpeed-LLM)
# MEGATRON_HOME       Megatron-LM's, core_v0.12.1 (default: beside MindSpeed-LLM)
# PYTHON              the interpreter to make it with (3.10 to 3.12; default python3)
# TORCH_INDEX_URL     where the CPU build of torch is, unless pip's own index has it
#
# Nothing is written to the sources: Megatron-LM, which compiles a helper in its own folder, is copied.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

say() { echo "rehearse: $*" >&2; }
fail() {
    echo "error: $*" >&2
    exit 1
}
source requirements/lock.sh
source requirements/sources.sh
find_sources
[ -n "$MINDSPEED_HOME" ] || fail "found no MindSpeed in $(dirname "$MINDSPEED_LLM_HOME"); set MINDSPEED_HOME to its sources"
[ -n "$MEGATRON_HOME" ] || fail "found no Megatron-LM in $(dirname "$MINDSPEED_LLM_HOME"); set MEGATRON_HOME to its sources"

VENV=.venv-rehearsal
DONE=$VENV/installed
INPUTS=(requirements/rehearsal.txt "$MEGATRON_HOME/megatron/core/package_info.py")
finished() {
    local file
    for file in "${INPUTS[@]}"; do
        grep -qxF "$(cksum "$file")" "$DONE" 2> /dev/null || return 1
    done
}
if finished; then exit 0; fi
lock "$PWD/$VENV.lock"
if finished; then exit 0; fi # by the one that we waited for

if ! "$VENV/bin/python" -m pip --version > /dev/null 2>&1; then
    PYTHON=${PYTHON:-python3}
    "$PYTHON" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 13))' ||
        fail "$("$PYTHON" --version) is not supported; expected Python 3.10 to 3.12, as numpy 1.26 does (set PYTHON)"
    say "making $VENV with $("$PYTHON" --version)"
    "$PYTHON" -m venv "$VENV" || {
        rm -rf "$VENV"
        fail "could not make $VENV (on Debian and Ubuntu: apt install python3-venv)"
    }
fi
pip() { "$VENV/bin/python" -m pip --disable-pip-version-check "$@"; }

PIN=$(sed -n 's/^torch==//p' requirements/rehearsal.txt)
if [ "$(uname -s)" = Linux ] && ! "$VENV/bin/python" -c "import torch; assert torch.__version__ == '$PIN+cpu'" 2> /dev/null; then
    say "torch==$PIN+cpu"
    pip install -qq --no-deps "torch==$PIN+cpu" 2> /dev/null ||
        pip install -q --no-deps "torch==$PIN+cpu" --retries 2 \
            --index-url "${TORCH_INDEX_URL:-https://download.pytorch.org/whl/cpu}" ||
        fail "torch==$PIN+cpu could not be installed; set TORCH_INDEX_URL to a mirror that has it"
fi
say requirements/rehearsal.txt
pip install -qq -r requirements/rehearsal.txt
say "a copy of $MEGATRON_HOME/megatron"
rm -rf "$VENV/megatron-lm"
mkdir -p "$VENV/megatron-lm"
cp -R "$MEGATRON_HOME/megatron" "$VENV/megatron-lm/megatron"
for file in "${INPUTS[@]}"; do
    cksum "$file"
done > "$DONE"
say "done"
