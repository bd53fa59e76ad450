#!/usr/bin/env bash
# Installs the kit into .venv, for the device that is here. Run again, it does only what has changed.
#
#   bash requirements/install.sh            # what training needs
#   bash requirements/install.sh test       # and what the tests need
#
# PYTHON           the interpreter to make .venv with (3.10 to 3.13; default python3)
# DEVICE           cpu or cuda, where the one found is not the one wanted
# TORCH_INDEX_URL  where the CPU build of torch is, unless pip's own index has it
#                  (default https://download.pytorch.org/whl/cpu)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

source requirements/venv.sh
source requirements/lock.sh

DEVICE=${DEVICE:-$(nvidia-smi -L > /dev/null 2>&1 && echo cuda || echo cpu)}
case $DEVICE in
    cpu) ;;
    cuda) nvidia-smi -L > /dev/null 2>&1 || fail "DEVICE=cuda, but nvidia-smi finds no GPU here; unset DEVICE" ;;
    npu) fail "on an NPU the kit runs in the environment that has torch_npu: see requirements/ascend.txt" ;;
    *) fail "DEVICE=$DEVICE: expected cpu or cuda" ;;
esac
FILES=("requirements/$DEVICE.txt" requirements/common.txt)
[ "${1:-}" = test ] && FILES+=(requirements/docs.txt requirements/test.txt)

VENV=.venv
INPUTS=("${FILES[@]}" pyproject.toml setup.py)
begin
make_venv 13
# What is changed from here on is not finished, whatever it was before; one device's torch replaces the other's.
DONE=$VENV/installed
for file in requirements/cpu.txt requirements/cuda.txt "${INPUTS[@]}"; do
    [ -f "$DONE" ] || break
    grep -v " $file\$" "$DONE" > "$DONE.new" || true # nothing left is fine
    mv "$DONE.new" "$DONE"
done

PIN=$(sed -n 's/^torch==//p' "requirements/$DEVICE.txt")
# e.g. "2.13.0 cpu"; empty where there is none
BUILD=$(.venv/bin/python -c 'import torch
print(torch.__version__.split("+")[0], "cuda" if torch.version.cuda else "cpu")' 2> /dev/null) || BUILD=
if [ "$DEVICE" = cpu ] && [ "$(uname -s)" = Linux ] && [ "${BUILD% *}" != "$PIN" ]; then
    cpu_torch "$PIN"
elif [ "$DEVICE" = cuda ] && [ "${BUILD#* }" = cpu ]; then
    # To pip the CPU build is that version, too. Its CUDA libraries come with the requirements below.
    say "torch==$PIN in place of the CPU build"
    pip install -q --force-reinstall --no-deps "torch==$PIN"
fi
for file in "${FILES[@]}"; do
    [ "$file" = requirements/common.txt ] && continue # the device's file includes it
    say "$file"
    pip install -qq -r "$file"
done
# Ten times faster data conversion, with the same tokens; not built for every platform, and not needed.
pip install -qq --only-binary :all: "gigatoken==0.10.0" 2> /dev/null ||
    say "gigatoken has no build for this platform: data conversion will use tokenizers"
pip install -qq --no-deps -e .
for file in "${INPUTS[@]}"; do
    cksum "$file"
done >> "$DONE"
say "done"
