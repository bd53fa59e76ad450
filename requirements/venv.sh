# Sourced by install.sh and rehearse.sh: what both do to make an environment. They set VENV, its folder in this checkout,
# and INPUTS, the files that go into it.
# shellcheck shell=bash

say() { echo "$(basename "$0" .sh): $*" >&2; }
fail() {
    echo "error: $*" >&2
    exit 1
}

# Whether all is installed: that leaves a line for each file that went into it.
finished() {
    local file
    for file in "${INPUTS[@]}"; do
        grep -qxF "$(cksum "$file")" "$VENV/installed" 2> /dev/null || return 1
    done
}

# Ends the script where there is nothing to do; one process at a time comes further.
begin() {
    if finished; then exit 0; fi
    lock "$PWD/$VENV.lock"
    if finished; then exit 0; fi # by the one that we waited for
}

# All is installed: the next run has nothing to do.
record() {
    local file
    for file in "${INPUTS[@]}"; do
        cksum "$file"
    done > "$VENV/installed"
    say "done"
}

pip() { "$VENV/bin/python" -m pip --disable-pip-version-check "$@"; }

# make_venv NEWEST [OLDEST]: an empty one, unless it is there, of PYTHON 3.OLDEST (default 3.10) to 3.NEWEST.
make_venv() {
    local oldest=${2:-10}
    if pip --version > /dev/null 2>&1; then return; fi
    PYTHON=${PYTHON:-python3}
    command -v "$PYTHON" > /dev/null || fail "no $PYTHON on the PATH; install Python 3.$oldest to 3.$1, or set PYTHON"
    "$PYTHON" -c "import sys; sys.exit(not (3, $oldest) <= sys.version_info[:2] <= (3, $1))" ||
        fail "$("$PYTHON" --version) is not supported; expected Python 3.$oldest to 3.$1 (set PYTHON)"
    say "making $VENV with $("$PYTHON" --version)"
    "$PYTHON" -m venv "$VENV" || {
        rm -rf "$VENV" # half of one would look like a whole one to the next run
        fail "could not make $VENV (on Debian and Ubuntu: apt install python3-venv)"
    }
}

# cpu_torch VERSION: PyPI's torch for Linux brings gigabytes of CUDA. An index of yours may have the CPU build; else
# PyTorch's has.
cpu_torch() {
    local torch="torch==$1+cpu"
    say "$torch"
    pip install -qq --no-deps "$torch" 2> /dev/null ||
        pip install -q --no-deps "$torch" --retries 2 \
            --index-url "${TORCH_INDEX_URL:-https://download.pytorch.org/whl/cpu}" ||
        fail "$torch could not be installed for $("$VENV/bin/python" --version); set TORCH_INDEX_URL to a mirror that has it"
}
