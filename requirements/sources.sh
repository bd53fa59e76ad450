# Sourced: where the sources of MindSpeed-LLM and of what it stands on are.
# shellcheck shell=bash

# find_sources: sets MINDSPEED_LLM_HOME, and MINDSPEED_HOME and MEGATRON_HOME if they are beside it (else to nothing).
find_sources() {
    local checkout place
    checkout=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
    if [ -z "${MINDSPEED_LLM_HOME:-}" ]; then
        for place in "$(dirname "$checkout")/MindSpeed-LLM" /workspace/MindSpeed-LLM; do
            [ ! -f "$place/pretrain_gpt.py" ] || { MINDSPEED_LLM_HOME=$place && break; }
        done
    fi
    [ -f "${MINDSPEED_LLM_HOME:-}/pretrain_gpt.py" ] || fail "found no MindSpeed-LLM in" \
        "${MINDSPEED_LLM_HOME:-$(dirname "$checkout")/MindSpeed-LLM or /workspace/MindSpeed-LLM}; set MINDSPEED_LLM_HOME to its sources"
    MINDSPEED_LLM_HOME=$(cd "$MINDSPEED_LLM_HOME" > /dev/null && pwd) # its programs run in a folder of their own
    MINDSPEED_HOME=$(source_with mindspeed/megatron_adaptor.py "${MINDSPEED_HOME:-}" MindSpeed)
    MEGATRON_HOME=$(source_with megatron/core/package_info.py "${MEGATRON_HOME:-}" Megatron-LM)
    export MINDSPEED_LLM_HOME MINDSPEED_HOME MEGATRON_HOME
}

# source_with FILE GIVEN NAME: GIVEN, or the folder NAME beside MindSpeed-LLM, if it holds FILE.
source_with() {
    local place=${2:-$(dirname "$MINDSPEED_LLM_HOME")/$3}
    [ -z "$2" ] || [ -f "$2/$1" ] || fail "$2 has no $1: it is not the folder of $3"
    [ ! -f "$place/$1" ] || (cd "$place" > /dev/null && pwd)
}
