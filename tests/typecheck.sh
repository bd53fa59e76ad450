#!/usr/bin/env bash
# mypy on the package as it is when installed: models/, preprocess/ and converters/ inside minimind_mcore/.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

VIEW=.venv/typecheck
rm -rf "$VIEW/minimind_mcore" # links of modules that are gone
mkdir -p "$VIEW/minimind_mcore"
ln -sfn "$PWD"/minimind_mcore/* "$VIEW/minimind_mcore/"
for room in models preprocess converters; do
    ln -sfn "$PWD/$room" "$VIEW/minimind_mcore/$room"
done
cd "$VIEW"
exec "${1:-../../.venv/bin/python}" -m mypy --config-file ../../pyproject.toml
