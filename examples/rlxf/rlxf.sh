# Sourced by the scripts beside it: what starts, joins and leaves a Ray cluster, and what a run needs.
# shellcheck shell=bash
#
# Settings, from the environment:
#   CONFIG         a YAML of configs/rlxf (default: on a CPU grpo_minimind_tiny, elsewhere grpo_minimind3)
#   BACKEND        embedded, or mindspeed-rl (default: mindspeed-rl on an NPU, embedded elsewhere)
#   RAY_PORT       of the head (default 6766)
#   NUM_CPUS       that Ray gives away on this host (default: all cores)
#   RAY_TMPDIR     where Ray logs, and keeps its sockets (default: Ray's own, /tmp/ray)
#   WAIT_SECONDS   how long to wait for the head or for hosts (default 600)
# Arguments are hydra overrides, such as actor_config.lr=1e-6; --dry-run checks everything and trains nothing. Paths in the YAML are relative to the repository.
# common.sh has the settings of Python, device and data.
RL_BACKEND=${BACKEND:-}
BACKEND=native
source "$(dirname "${BASH_SOURCE[0]}")/../mcore/minimind/common.sh"
cd "$ROOT" || fail "$ROOT is gone"

case ${RL_BACKEND:=$([ "$DEVICE" = npu ] && echo mindspeed-rl || echo embedded)} in
    embedded | mindspeed-rl) export BACKEND=$RL_BACKEND ;;
    *) fail "BACKEND=$RL_BACKEND: expected embedded or mindspeed-rl" ;;
esac
CONFIG=${CONFIG:-$([ "$DEVICE" = cpu ] && echo grpo_minimind_tiny || echo grpo_minimind3)}
CONFIG=${CONFIG%.yaml}
RAY_PORT=${RAY_PORT:-6766}
WAIT_SECONDS=${WAIT_SECONDS:-600}
export RAY_AUTH_MODE=${RAY_AUTH_MODE:-disabled} # hosts share no secret; give RAY_AUTH_MODE=token where they do
RAY_PID=

# start_ray FLAGS...: a Ray node of this host, which ends with this script and touches no other.
start_ray() {
    local node=(--block --num-cpus "${NUM_CPUS:-$(cores)}" --disable-usage-stats "$@")
    [ "$DEVICE" != npu ] || node+=(--resources "{\"NPU\": $NPUS_PER_NODE}")
    [ "$DEVICE" != cuda ] || node+=(--num-gpus "$NPUS_PER_NODE")
    [ "$DEVICE" != cpu ] || node+=(--num-gpus 0)
    "$PYTHON" -m ray.scripts.scripts start "${node[@]}" &
    RAY_PID=$!
    trap stop_ray EXIT
    trap 'exit 130' INT
    trap 'exit 143' TERM
}

# shellcheck disable=SC2317,SC2329  # called by the trap
stop_ray() {
    [ -z "$RAY_PID" ] || ! kill -TERM "$RAY_PID" 2> /dev/null || wait "$RAY_PID" 2> /dev/null || true
}

# prepare_tiny: the sample problems, and a model that has seen their form, for the tiny configurations.
prepare_tiny() {
    local data=$DATA_DIR/grpo_minimind_math begin=$ROOT/outputs/minimind3_tiny/math_sft
    [[ $CONFIG == *_tiny ]] || return 0
    OVERRIDES=(
        "megatron_training.tokenizer_name_or_path=$DATA_DIR/tokenizer"
        "megatron_training.data_path=$data"
        "minimind.eval_data=${data}_unseen"
        "actor_config.load=$begin/checkpoints"
    )
    if [ -n "$DRY_RUN" ]; then
        [ -f "$begin/checkpoints/latest_checkpointed_iteration.txt" ] || OVERRIDES+=(--data-pending)
        return
    fi
    [ -f "${data}_packed_input_ids_document.idx" ] || bash "$ROOT/examples/data/preprocess_data.sh" grpo_minimind_math
    if [ ! -f "$begin/checkpoints/latest_checkpointed_iteration.txt" ]; then
        MODEL=minimind3_tiny DATA_PATH=$DATA_DIR/sample_math_sft.jsonl TOKENIZER_PATH=$DATA_DIR/tokenizer \
            PROMPT_TYPE=chatml_de OUTPUT_DIR=$begin CKPT_LOAD_DIR=$ROOT/outputs/minimind3_tiny/none BACKEND=native \
            bash "$ROOT/examples/mcore/minimind/tune_minimind_full_ptd.sh"
    fi
}

# run_training OVERRIDES...: train_grpo.py, or the program of the configuration's algorithm.
run_training() {
    local program=train_grpo.py
    [[ $CONFIG != ppo_* ]] || program=train_ppo.py
    OVERRIDES=()
    prepare_tiny
    show "$PYTHON" "$ROOT/$program" --config-name "$CONFIG" ${OVERRIDES[@]+"${OVERRIDES[@]}"} "$@"
    "$PYTHON" "$ROOT/$program" --config-name "$CONFIG" ${OVERRIDES[@]+"${OVERRIDES[@]}"} "$@"
}
