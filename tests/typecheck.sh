#!/usr/bin/env bash
# Types: mypy in strict mode over the package, pyright in basic mode over everything.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PYTHON=${1:-.venv/bin/python}
"$PYTHON" -m mypy
exec "$PYTHON" -m pyright --pythonpath "$PYTHON"
