#!/usr/bin/env bash
# Types, as mypy checks them.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
exec "${1:-.venv/bin/python}" -m mypy
