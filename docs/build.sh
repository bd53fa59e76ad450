#!/usr/bin/env bash
# Builds the documentation site in both languages. A broken link or anchor is an error.
#
#   bash docs/build.sh [DIRECTORY]      # default: build/site; open its index.html, no server is needed
#
# PYTHON   interpreter of Python 3.11 or later with the packages of requirements/docs.txt (default: makes .venv-docs)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

OUT=${1:-build/site}
if [ -z "${PYTHON:-}" ]; then
    [ -x .venv-docs/bin/python ] || python3 -m venv .venv-docs
    PYTHON=.venv-docs/bin/python
    "$PYTHON" -m pip install -qq -r requirements/docs.txt
fi
for language in en zh; do
    SITE_LANGUAGE=$language "$PYTHON" -m sphinx -W --keep-going -q -E -b html -d "$OUT/.doctrees" docs "$OUT/$language"
done
rm -rf "$OUT/.doctrees"
cp docs/site.html "$OUT/index.html"
touch "$OUT/.nojekyll" # without it GitHub Pages leaves out folders such as _static
echo "$OUT/index.html"
