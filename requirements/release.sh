#!/usr/bin/env bash
# For maintainers, before a release: writes requirements/release-cpu.txt, all packages of the CPU image (x86_64, Python
# 3.11) with their hashes. Install them with: pip install --require-hashes -r requirements/release-cpu.txt
#
#   bash requirements/release.sh
#
# Needs uv (pip install uv). TORCH_INDEX_URL: where the CPU build of torch is (default PyTorch's own index).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

INPUT=$(mktemp --suffix=.txt)
trap 'rm -f "$INPUT"' EXIT
sed -e 's/^\(torch==.*\)/\1+cpu/' -e "s#^-r #-r $PWD/#" cpu.txt > "$INPUT"
{
    echo "# The packages of a release on a CPU, x86_64 and Python 3.11, with their hashes. Made by requirements/release.sh."
    uv pip compile "$INPUT" --quiet --generate-hashes --no-annotate --no-header --python-version 3.11 \
        --python-platform x86_64-manylinux_2_28 --index-strategy unsafe-best-match \
        --extra-index-url "${TORCH_INDEX_URL:-https://download.pytorch.org/whl/cpu}" ${FIND_LINKS:+--find-links "$FIND_LINKS"}
} > release-cpu.txt.new
mv release-cpu.txt.new release-cpu.txt
