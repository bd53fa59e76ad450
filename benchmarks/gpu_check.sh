#!/usr/bin/env bash
# Checks the kit on a GPU in one call of at most six minutes, without a network and without an installation:
#
#   bash benchmarks/gpu_check.sh [--part environment|correctness|speed|rest] [--dry-run]
#
# Python is PYTHON, else that of .venv, else python3. Packages that it lacks are taken from .gpu_wheels, which
# benchmarks/gpu_wheels.sh fills on a machine with a network. Results: $OUT, or outputs/gpu_check. docs/benchmarks.md
# has the rest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if [ -z "${PYTHON:-}" ]; then
    PYTHON=python3
    if [ -x .venv/bin/python ]; then PYTHON=.venv/bin/python; fi
fi
export PYTHONPATH="$PWD/benchmarks:$PWD${PYTHONPATH:+:$PYTHONPATH}"
exec "$PYTHON" -m gpu_check "$@"
