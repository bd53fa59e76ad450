#!/usr/bin/env bash
# Installs what the tests need into .venv and runs them, with the linters first.
#
#   bash tests/run.sh                          # everything that is not slow
#   bash tests/run.sh tests/unit -k presets    # arguments go to pytest
#   bash tests/run.sh -m slow                  # what takes minutes
#
# MINIMIND_TOKENIZER_DIR   a folder with MiniMind's published tokenizers as v2/ and v3/; tests that need them skip without
# MINIMIND_SAMPLES_DIR     a folder with samples of MiniMind's own jsonl files
# MINIMIND_DIR             a checkout of MiniMind, whose eval_llm.py loads what the converters write
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

export DEVICE=cpu
bash requirements/install.sh test
PYTHON=$PWD/.venv/bin/python

# The version that MindSpeed stands on, beside the installed one. It has builds for Python 3.10 and 3.11 only.
export MCORE_012_DIR=$PWD/.venv/megatron-core-0.12.1
if [ ! -d "$MCORE_012_DIR" ] && ! "$PYTHON" -m pip install -qq --no-deps --only-binary :all: \
    --target "$MCORE_012_DIR" megatron-core==0.12.1 2> /dev/null; then
    echo "tests: megatron-core 0.12.1 has no build for $("$PYTHON" --version); its tests skip" >&2
    unset MCORE_012_DIR
fi
# The version that MiniMind stands on.
export TRANSFORMERS_4_DIR=$PWD/.venv/transformers-4
if [ ! -d "$TRANSFORMERS_4_DIR" ] && ! "$PYTHON" -m pip install -qq --no-deps --only-binary :all: \
    --target "$TRANSFORMERS_4_DIR" transformers==4.57.6 huggingface_hub==0.36.2 tokenizers==0.22.1 2> /dev/null; then
    echo "tests: transformers 4 cannot be installed; its tests skip" >&2
    unset TRANSFORMERS_4_DIR
fi
# The client that most programs still have.
export OPENAI_1_DIR=$PWD/.venv/openai-1
if [ ! -d "$OPENAI_1_DIR" ] && ! "$PYTHON" -m pip install -qq --no-deps --only-binary :all: \
    --target "$OPENAI_1_DIR" openai==1.109.1 distro==1.9.0 sniffio==1.3.1 2> /dev/null; then
    echo "tests: openai 1.x cannot be installed; its tests skip" >&2
    unset OPENAI_1_DIR
fi

# What builds the web pages.
if command -v npm > /dev/null && [ ! web/node_modules/.package-lock.json -nt web/package-lock.json ] &&
    ! npm ci --prefix web --ignore-scripts --no-audit --no-fund --loglevel error > /dev/null; then
    echo "tests: npm cannot install the packages of web/; the tests of the pages' sources skip" >&2
fi

if [ $# -eq 0 ]; then
    "$PYTHON" -m ruff check .
    "$PYTHON" -m ruff format --check --quiet . || {
        echo "error: run .venv/bin/ruff format" >&2
        exit 1
    }
    bash tests/typecheck.sh "$PYTHON"
    # Two processes, each with the tests of one file at a time, in the order of their names: the long files come first.
    export OMP_NUM_THREADS=1
    set -- -m "not slow" --numprocesses 2 --dist loadfile --no-loadscope-reorder --durations 60
fi
exec "$PYTHON" -m pytest "$@"
