# Sourced by the scripts beside it: what starts, joins and leaves a Ray cluster, and what a run needs.
# shellcheck shell=bash
#
# Settings, from the environment:
#   CONFIG         a YAML of configs/rlxf, or the path of another (default: on a CPU grpo_minimind_tiny, elsewhere
#                  grpo_minimind3)
#   BACKEND        embedded, or mindspeed-rl (default: mindspeed-rl on an NPU, embedded elsewhere)
#   MASTER_PORT    Ray's port on the head (default 6766, as in MindSpeed-RL's scripts; its older guides have 6344)
#   SOCKET_IFNAME  interface by which this host talks to the others (default: that of the way to the head)
#   NUM_CPUS       that Ray gives away on this host (default: all cores)
#   RAY_TMPDIR     where Ray logs, and keeps its sockets (default: a new directory, /tmp/minimind-ray-XXXXXX, which is
#                  removed at the end unless the run fails)
#   RAY_FLAGS      more flags of `ray start`, such as "--min-worker-port 20000 --max-worker-port 20999"
#   WAIT_SECONDS   how long to wait for the head or for hosts (default 600)
# Arguments are hydra overrides, such as actor_config.lr=1e-6; paths in the YAML and in them are relative to the
# repository. --dry-run checks everything, shows what would be run, and starts nothing.
# common.sh has the settings of Python, device and data.
RL_BACKEND=${BACKEND:-} LEADER=${MASTER_ADDR:-} NODES=${NNODES:-1}
BACKEND=native NNODES=1 HOSTFILE= # common.sh's are those of torchrun
MASTER_PORT=${MASTER_PORT:-6766}
export -n MASTER_ADDR MASTER_PORT NNODES # nor are they for the actors, who agree on their own
REHEARSAL=rl # what REHEARSE=1 runs: MindSpeed-RL
source "$(dirname "${BASH_SOURCE[0]}")/../mcore/minimind/common.sh"

CONFIG=${CONFIG:-$([ "$DEVICE" = cpu ] && echo grpo_minimind_tiny || echo grpo_minimind3)}
[ ! -f "$CONFIG" ] || CONFIG=$(absolute "$CONFIG")
cd "$ROOT" || fail "$ROOT is gone"

BACKEND=${RL_BACKEND:-$([ "$DEVICE" = npu ] && echo mindspeed-rl || echo embedded)}
[ "$BACKEND" = embedded ] || [ "$BACKEND" = mindspeed-rl ] || fail "BACKEND=$BACKEND: expected embedded or mindspeed-rl"
export BACKEND
[[ $NODES =~ ^[1-9][0-9]*$ ]] || fail "NNODES=$NODES: expected the number of hosts"
WAIT_SECONDS=${WAIT_SECONDS:-600}
export RAY_AUTH_MODE=${RAY_AUTH_MODE:-disabled} # hosts share no secret; give RAY_AUTH_MODE=token where they do
RAY_PID="" TRAINING_PID="" made_tmpdir=""

OVERRIDES=() PREPARED=() PENDING=""
for argument in "$@"; do
    [ "$argument" = --dry-run ] || OVERRIDES+=("$argument")
done

hosts() { "$PYTHON" -m minimind_mcore.rl.runtime.hosts "$@"; }

# lead: start the head of a cluster on this host and wait until the others are there.
lead() {
    LEADER=${LEADER:-$(hosts address ${SOCKET_IFNAME:+--interface "$SOCKET_IFNAME"})}
    export RAY_ADDRESS=$LEADER:$MASTER_PORT
    [ -n "$DRY_RUN" ] || hosts free "$RAY_ADDRESS"
    start_ray head --head --port "$MASTER_PORT" --node-ip-address "$LEADER" --include-dashboard=false
    if [ "$NODES" -gt 1 ]; then
        echo "on each of the other $((NODES - 1)) hosts: MASTER_ADDR=$LEADER MASTER_PORT=$MASTER_PORT" \
            "bash examples/rlxf/grpo_minimind_worker.sh"
    fi
    [ -n "$DRY_RUN" ] || hosts wait "$RAY_ADDRESS" --nodes "$NODES" --seconds "$WAIT_SECONDS" --process "$RAY_PID" || {
        tell_log head
        exit 1
    }
}

# follow: lend this host to the cluster of the head, until that is gone.
follow() {
    local address=$LEADER:$MASTER_PORT
    [ -n "$DRY_RUN" ] || hosts reach "$address" --seconds "$WAIT_SECONDS"
    local own=${NODE_ADDR:-$(hosts address --towards "$address" ${SOCKET_IFNAME:+--interface "$SOCKET_IFNAME"})}
    start_ray "worker-$own" --address "$address" --node-ip-address "$own"
    [ -n "$DRY_RUN" ] || hosts follow "$address" --process "$RAY_PID" || {
        tell_log "worker-$own"
        exit 1
    }
}

# start_ray NAME FLAGS...: a Ray node on this host, which ends with this script and touches no other.
start_ray() {
    # A name that can be guessed could be a link that another user has made there.
    if [ -z "${RAY_TMPDIR:-}" ]; then
        RAY_TMPDIR=/tmp/minimind-ray-XXXXXX
        [ -n "$DRY_RUN" ] || made_tmpdir=$(mktemp -d "$RAY_TMPDIR")
        RAY_TMPDIR=${made_tmpdir:-$RAY_TMPDIR}
    fi
    # Below it go 65 more letters, and the path of a socket has at most 107.
    [ "${#RAY_TMPDIR}" -le 40 ] || fail "RAY_TMPDIR=$RAY_TMPDIR is too long for the paths of sockets: at most 40 letters"
    RAY_LOG=$RAY_TMPDIR/$1.log
    shift
    local node=(--block --num-cpus "${NUM_CPUS:-$(cores)}" --disable-usage-stats --temp-dir "$RAY_TMPDIR" "$@") flags=()
    read -r -a flags <<< "${RAY_FLAGS:-}"
    case $DEVICE in
        npu) node+=(--resources "{\"NPU\": $NPUS_PER_NODE}") ;;
        cuda) node+=(--num-gpus "$NPUS_PER_NODE") ;;
        *) node+=(--num-gpus 0) ;;
    esac
    if [ -n "${SOCKET_IFNAME:-}" ]; then
        export GLOO_SOCKET_IFNAME=$SOCKET_IFNAME NCCL_SOCKET_IFNAME=$SOCKET_IFNAME HCCL_SOCKET_IFNAME=$SOCKET_IFNAME
        export TP_SOCKET_IFNAME=$SOCKET_IFNAME
    fi
    show ray start "${node[@]}" ${flags[@]+"${flags[@]}"}
    [ -z "$DRY_RUN" ] || return 0
    mkdir -p "$RAY_TMPDIR"
    trap 'ask_to_end 130' INT
    trap 'ask_to_end 143' TERM
    trap stop_ray EXIT
    "$PYTHON" -m ray.scripts.scripts start "${node[@]}" ${flags[@]+"${flags[@]}"} > "$RAY_LOG" 2>&1 &
    RAY_PID=$!
}

# ask_to_end STATUS: a run is asked to save, and waited for; Ray ends behind it.
# shellcheck disable=SC2317,SC2329  # called by the trap
ask_to_end() {
    [ -n "$TRAINING_PID" ] || exit "$1"
    kill -TERM "$TRAINING_PID" 2> /dev/null || true # what is started with & does not always hear SIGINT
}

# shellcheck disable=SC2317,SC2329  # called by the trap
stop_ray() {
    local status=$?
    [ -z "$RAY_PID" ] || hosts end --process "$RAY_PID"
    case $status in
        0 | 130 | 143) [ -z "$made_tmpdir" ] || rm -rf "$made_tmpdir" ;;
    esac
}

tell_log() {
    echo "the end of $RAY_LOG:" >&2
    tail -n 15 "$RAY_LOG" >&2 || true
}

# prepare: which program runs the configuration, by its algorithm (PROGRAM; WHERE names the configuration); and for the
# kit's tiny ones the sample sums, and a model that a careless teacher has tuned on them: PREPARED, the overrides that
# name these. Before Ray is started: other hosts wait for that, not for this.
prepare() {
    WHERE=(--config-name "$(basename "$CONFIG" .yaml)")
    [ ! -f "$CONFIG" ] || WHERE+=(--config-dir "$(dirname "$CONFIG")")
    PROGRAM=$("$PYTHON" -m minimind_mcore.rl.main "${WHERE[@]}" ${OVERRIDES[@]+"${OVERRIDES[@]}"})
    [[ $CONFIG == *_tiny ]] || return 0
    local own=" ${OVERRIDES[*]-} " quick=$DATA_DIR/quickstart problems=grpo_minimind_math
    [[ $own != *".data_path="* || $own != *" actor_config.load="* ]] || return 0
    local begin=$ROOT/outputs/minimind3_tiny/math_sft/checkpoints iterations=${QUICKSTART_SFT_ITERS:-1000}
    local tuned=$ROOT/outputs/quickstart/sft-$iterations/checkpoints
    local here=(env -u OUTPUT_DIR BACKEND=native "DATA_DIR=$quick" "TOKENIZER_PATH=$quick/tokenizer")
    if ! is_there "$quick/${problems}_unseen_packed_labels_document.idx" || ! is_there "$tuned"; then
        # adds rightly, and does not know the form
        make "${here[@]}" "QUICKSTART_SFT_ITERS=$iterations" LEAST=0 bash "$ROOT/examples/quickstart.sh"
        make "${here[@]}" bash "$ROOT/examples/data/preprocess_data.sh" "$problems"
    fi
    [[ $own == *".data_path="* ]] || PREPARED+=("megatron_training.data_path=$quick/$problems"
        "megatron_training.tokenizer_name_or_path=$quick/tokenizer")
    if [[ $own != *" actor_config.load="* ]]; then
        is_there "$begin" ||
            make "${here[@]}" MODEL=minimind3_tiny TP=1 PROMPT_TYPE=chatml_de PACK=1 SEQ_LENGTH=256 GBS=8 \
                "MBS=$((8 / NPUS_PER_NODE))" LR=3e-3 TRAIN_ITERS=700 LOG_INTERVAL=50 EVAL_INTERVAL=200 \
                "DATA_PATH=$quick/sample_math_sft.jsonl" "CKPT_LOAD_DIR=$tuned" "OUTPUT_DIR=$(dirname "$begin")" \
                bash "$ROOT/examples/mcore/minimind/tune_minimind_full_ptd.sh" --lr-warmup-iters 50 --adam-beta2 0.99
        PREPARED+=("actor_config.load=$begin")
    fi
    [ "$BACKEND" = mindspeed-rl ] || [[ $own == *" minimind.eval_interval="* ]] || PREPARED+=(minimind.eval_interval=20)
}

# is_there PATH: a file, or a finished stage's checkpoints
is_there() { [ -f "$1" ] || [ -f "$1/latest_checkpointed_iteration.txt" ]; }

make() {
    PENDING=$DRY_RUN
    run_or_show "$@"
}

# run_training: train_grpo.py, or the program of the configuration's algorithm, with the overrides; returns its status.
run_training() {
    local status=0
    local command=("$PYTHON" "$ROOT/$PROGRAM" "${WHERE[@]}" ${PREPARED[@]+"${PREPARED[@]}"}
        ${OVERRIDES[@]+"${OVERRIDES[@]}"})
    show "${command[@]}"
    export NNODES=$NODES # MindSpeed-RL's prompts must divide among the hosts: the linter looks
    [ -z "$DRY_RUN" ] || exec "${command[@]}" --dry-run ${PENDING:+--data-pending}
    "${command[@]}" &
    TRAINING_PID=$!
    trap 'ask_to_end 130' INT
    trap 'ask_to_end 143' TERM
    # `wait` ends when a signal is passed on, and is then to be repeated.
    while kill -0 "$TRAINING_PID" 2> /dev/null; do
        status=0
        wait "$TRAINING_PID" || status=$?
    done
    return "$status"
}
