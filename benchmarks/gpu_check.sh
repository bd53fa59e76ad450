#!/usr/bin/env bash
# Checks the kit on a GPU in one call of at most seven minutes, without a network and without an installation:
#
#   bash benchmarks/gpu_check.sh [--part environment|correctness|speed|rest] [--dry-run]
#
# The interpreter is PYTHON, or .venv/bin/python, or python3, whichever exists first. Missing packages come from
# .gpu_wheels: benchmarks/gpu_wheels.sh fills this folder on a machine with a network. Results go to $OUT, or to
# outputs/gpu_check. docs/benchmarks.md has the rest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if [ -z "${PYTHON:-}" ]; then
    PYTHON=python3
    if [ -x .venv/bin/python ]; then PYTHON=.venv/bin/python; fi
fi
export PYTHONPATH="$PWD/benchmarks:$PWD${PYTHONPATH:+:$PYTHONPATH}"
exec "$PYTHON" -m gpu_check "$@"
