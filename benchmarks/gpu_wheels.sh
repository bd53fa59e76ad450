#!/usr/bin/env bash
# Collects the packages that a GPU host without a network lacks, as wheels of Python 3.12 on Linux x86-64, into
# .gpu_wheels, which git ignores. benchmarks/gpu_check.sh unpacks those that are missing where it runs.
#
#   bash benchmarks/gpu_wheels.sh                   # 36 MB
#   NEWER=0.17.1 bash benchmarks/gpu_wheels.sh      # the newer megatron-core to try; NEWER= for none
#
# It prints the size of the checkout and the wheels together, and ends with status 1 if that is above 60 MB: both are
# copied to the host.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

LIMIT_MB=60
FOLDER=${FOLDER:-.gpu_wheels}
NEWER=${NEWER-0.17.1}
# ray and vLLM are left out: the check does not use them.
WHEELS=(
    megatron-core==0.16.1
    psutil==7.2.2 xxhash==4.1.0 tqdm==4.70.1
    # the curves of a run
    matplotlib==3.11.2 contourpy cycler fonttools kiwisolver pyparsing python-dateutil six pillow
    # the embedded server
    fastapi==0.165.0 starlette==1.10.0 opentelemetry-api pydantic==2.14.4 pydantic-core==2.50.5 annotated-types typing-inspection
    uvicorn==0.54.0 httptools sse-starlette==3.7.0 llguidance==1.9.1
)

PYTHON=${PYTHON:-python3}
if ! "$PYTHON" -m pip --version > /dev/null 2>&1 && [ -x .venv/bin/python ]; then PYTHON=.venv/bin/python; fi

# collect DIRECTORY REQUIREMENT...
collect() {
    local platforms=() number
    # pip matches the tags of wheels exactly: a wheel for glibc 2.17 is not one for 2.28 to it.
    for number in 17 24 26 27 28 31 34 35 39; do platforms+=(--platform "manylinux_2_${number}_x86_64"); done
    "$PYTHON" -m pip --disable-pip-version-check download -q --no-deps --only-binary=:all: --python-version 3.12 \
        --implementation cp --platform manylinux2014_x86_64 --platform manylinux1_x86_64 "${platforms[@]}" \
        --dest "$1" "${@:2}"
}

rm -rf "$FOLDER"
mkdir -p "$FOLDER"
collect "$FOLDER" "${WHEELS[@]}"

bytes() { # of what git has or would add, and of the wheels
    {
        git ls-files -z --cached --others --exclude-standard | xargs -0 -r stat --printf '%s\n' 2> /dev/null || true
        find "$FOLDER" -type f -printf '%s\n'
    } | awk '{ sum += $1 } END { print sum + 0 }'
}

if [ -n "$NEWER" ]; then
    if ! collect "$FOLDER/newer" "megatron-core==$NEWER"; then
        echo "gpu_wheels: megatron-core $NEWER cannot be downloaded and is left out" >&2
        rm -rf "$FOLDER/newer"
    elif [ "$(bytes)" -gt $((LIMIT_MB * 1000000)) ]; then
        echo "gpu_wheels: megatron-core $NEWER does not fit into $LIMIT_MB MB and is left out" >&2
        rm -rf "$FOLDER/newer"
    fi
fi

find "$FOLDER" -name '*.whl' -printf '%s %P\n' | sort -k 2
total=$(bytes)
echo "checkout and wheels: $(awk -v b="$total" 'BEGIN { printf "%.1f", b / 1e6 }') MB (at most $LIMIT_MB)"
if [ "$total" -gt $((LIMIT_MB * 1000000)) ]; then
    echo "error: that is above $LIMIT_MB MB; leave wheels out, or files that the host does not need" >&2
    exit 1
fi
