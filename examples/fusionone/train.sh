#!/usr/bin/env bash
# What a training task runs: one of the scripts of examples/mcore/minimind, with its output also in a file.
#
#   LOG_DIR=/outputs/run/logs bash /workspace/algorithm/examples/fusionone/train.sh pretrain_minimind_ptd.sh [flags]
#
# LOG_DIR   an absolute directory; it is made. The log is task-DATE-nodeN.log
# The status that it exits with is the script's: a failed run never counts as finished. Settings are the script's own.
set -euo pipefail

fail() {
    echo "error: $*" >&2
    exit 1
}

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
SCRIPT=$ROOT/examples/mcore/minimind/${1:-}
[ -n "${1:-}" ] && [ -f "$SCRIPT" ] || fail "no script ${1:-(none given)} in $ROOT/examples/mcore/minimind"
shift
case ${LOG_DIR:-} in
    /*) mkdir -p "$LOG_DIR" || fail "LOG_DIR=$LOG_DIR cannot be made: is the directory for outputs mounted, and writable?" ;;
    *) fail "LOG_DIR=${LOG_DIR:-} is not an absolute path; a task starts in a directory of the platform's choice" ;;
esac
export LOG_DIR
LOG=$LOG_DIR/task-$(date +%Y%m%d-%H%M%S)-node${NODE_RANK:-0}.log
echo "log: $LOG"
cd "$ROOT"
bash "$SCRIPT" "$@" 2>&1 | tee -a "$LOG" # pipefail: the script's status
