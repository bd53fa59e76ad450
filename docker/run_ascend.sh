#!/usr/bin/env bash
# Start the Ascend image with the host's driver and some of its cards, and a command in it; without one the image's own:
# the doctor's table, then a shell.
#
#   bash docker/run_ascend.sh                                              # all cards
#   CARDS=2 bash docker/run_ascend.sh bash examples/mcore/minimind/pretrain_minimind_ptd.sh
#   CARDS=4,5 DATA=/data/minimind bash docker/run_ascend.sh
#   bash docker/run_ascend.sh --dry-run ...                                # print the docker command
#
# IMAGE     default minimind-mcore:ascend
# CARDS     a number of cards (the first ones), a list of their numbers (4,5; of one alone 4,), or all (default)
# DATA MODELS   directories of the host, seen as /data and /models, read-only (default: data and hf in the repository)
# OUTPUTS   directory of the host for checkpoints, logs and converted data (default: outputs in the repository); it is
#           outputs/ of the kit in the container, and of CODE
# MOUNTS    more files and directories of the host, one a line, each at its own path in the container, read-only
# CODE      a checkout to work in, seen as /workspace/algorithm (default: none; the image has its own copy)
# NAME      of the container (default minimind)
# SHM       shared memory (default 64g)
# DRIVER    the host's driver (default /usr/local/Ascend/driver)
# DOCKER    the program (default docker; podman works too)
# Settings of the scripts in examples/ that are in the environment (MODEL, TP, HCCL_..., ...) are passed on, with paths as
# the container has them; HOSTFILE is one of the host, and mounted. PYTHON, CANN_HOME and NNAL_HOME are the image's.
set -euo pipefail

fail() {
    echo "error: $*" >&2
    exit 1
}

# A directory or file of the host as docker wants it: a relative one it would take for a volume's name.
absolute() {
    case $1 in
        *:*) fail "$1: docker cannot mount a path with a colon" ;;
        /*) printf '%s\n' "$1" ;;
        \~/*) printf '%s\n' "$HOME/${1#??}" ;;
        *) printf '%s\n' "$PWD/$1" ;;
    esac
}

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
DOCKER=${DOCKER:-docker}
IMAGE=${IMAGE:-minimind-mcore:ascend}
DRIVER=$(absolute "${DRIVER:-/usr/local/Ascend/driver}")
DATA=$(absolute "${DATA:-$ROOT/data}")
MODELS=$(absolute "${MODELS:-$ROOT/hf}")
OUTPUTS=$(absolute "${OUTPUTS:-$ROOT/outputs}")
CODE=${CODE:+$(absolute "$CODE")}
[ -z "$CODE" ] || [ -d "$CODE" ] || fail "CODE=$CODE: there is no such directory"
KIT=/workspace/minimind-mcore # in the image
DEVICE_ROOT=${DEVICE_ROOT:-/dev} # where the cards are looked for; what is passed on is /dev

DRY_RUN=
if [ "${1:-}" = --dry-run ]; then
    DRY_RUN=1
    shift
fi

# The numbers of the host's cards, a line each.
cards_here() {
    local device
    for device in "$DEVICE_ROOT"/davinci[0-9]*; do
        [ ! -e "$device" ] || echo "${device##*/davinci}"
    done | sort -n
}

# CARDS as numbers, a line each.
cards_wanted() {
    local number='(0|[1-9][0-9]*)' cards=${CARDS:-all}
    if [ "$cards" = all ]; then
        cards_here
    elif [ "$cards" = 0 ]; then
        fail "CARDS=0: expected 1 card or more; to have the one with the number 0, CARDS=0,"
    elif [[ $cards =~ ^$number$ ]]; then
        seq 0 $((cards - 1))
    elif [[ $cards =~ ^($number,)+$number?$ ]]; then
        tr , '\n' <<< "$cards"
    else
        fail "CARDS=$cards: expected a number of cards, the numbers of cards separated by commas, or all"
    fi
}

HERE=$(cards_here)
if [ -z "$HERE" ] && { [ -z "$DRY_RUN" ] || [ "${CARDS:-all}" = all ]; }; then
    fail "found no $DEVICE_ROOT/davinci*: this host has no Ascend cards, or their driver is not loaded"
fi
WANTED=$(cards_wanted)

OPTIONS=(run --rm --interactive --name "${NAME:-minimind}" --network host --ipc host --shm-size "${SHM:-64g}"
    --ulimit memlock=-1)
[ ! -t 0 ] || OPTIONS+=(--tty)
for card in $WANTED; do
    if [ -z "$DRY_RUN" ] && ! grep -qx "$card" <<< "$HERE"; then
        fail "card $card: this host has $(tr '\n' ' ' <<< "$HERE")"
    fi
    OPTIONS+=(--device "/dev/davinci$card")
done
for device in davinci_manager devmm_svm hisi_hdc; do
    OPTIONS+=(--device "/dev/$device")
done

# The driver is the host's, and with it its tools; what some hosts do not have is left out.
[ -n "$DRY_RUN" ] || [ -d "$DRIVER" ] || fail "no driver at $DRIVER; set DRIVER to where it is installed"
OPTIONS+=(--volume "$DRIVER:/usr/local/Ascend/driver:ro")
for path in /usr/local/Ascend/firmware /usr/local/dcmi /usr/local/bin/npu-smi /usr/local/sbin/npu-smi \
    /etc/ascend_install.info /etc/hccn.conf; do
    if [ -n "$DRY_RUN" ] || [ -e "$path" ]; then OPTIONS+=(--volume "$path:$path:ro"); fi
done
[ -n "$DRY_RUN" ] || mkdir -p "$DATA" "$MODELS" "$OUTPUTS" || fail "DATA, MODELS and OUTPUTS must be directories"
OPTIONS+=(--volume "$DATA:/data:ro" --volume "$MODELS:/models:ro" --volume "$OUTPUTS:$KIT/outputs")
while IFS= read -r path; do
    [ -n "$path" ] || continue
    path=$(absolute "$path")
    OPTIONS+=(--volume "$path:$path:ro")
done <<< "${MOUNTS:-}"
if [ -n "$CODE" ]; then
    [ -n "$DRY_RUN" ] || mkdir -p "$CODE/outputs" # else docker makes it, for root
    OPTIONS+=(--volume "$CODE:/workspace/algorithm" --volume "$OUTPUTS:/workspace/algorithm/outputs"
        --workdir /workspace/algorithm)
fi

# Inside, the cards that are passed on are numbered from 0, whichever they are: ASCEND_RT_VISIBLE_DEVICES stays unset.
OPTIONS+=(--env "DATA_DIR=${DATA_DIR:-$KIT/outputs/data}")
if [ -n "${HOSTFILE:-}" ]; then
    HOSTFILE=$(absolute "$HOSTFILE")
    [ -n "$DRY_RUN" ] || [ -f "$HOSTFILE" ] || fail "HOSTFILE=$HOSTFILE: there is no such file"
    OPTIONS+=(--volume "$HOSTFILE:/workspace/hostfile:ro" --env HOSTFILE=/workspace/hostfile)
fi
SETTINGS=(
    # of device and hosts
    DEVICE BACKEND REHEARSE LOG_LEVEL NPUS_PER_NODE NNODES NODE_RANK MASTER_ADDR MASTER_PORT "${!HCCL_@}" "${!GLOO_@}"
    TASK_QUEUE_ENABLE CPU_AFFINITY_CONF PYTORCH_NPU_ALLOC_CONF OMP_NUM_THREADS
    # of data
    DATA_PATH TOKENIZER_PATH SEQ_LENGTH HANDLER_NAME PROMPT_TYPE MAP_KEYS JSON_KEYS OUTPUT_PREFIX WORKERS
    # of training
    MODEL RECIPE ROUTER_WEIGHT STAGE TP PP VPP EP CP MBS GBS EPOCHS TRAIN_ITERS LR PRECISION SAVE_INTERVAL LOG_INTERVAL
    EVAL_INTERVAL EVAL_ITERS SPLIT SEED CKPT_FORMAT OUTPUT_DIR CKPT_LOAD_DIR CKPT_SAVE_DIR LOG_DIR TEACHER PACK
    # of checkpoints
    LOAD_DIR SAVE_DIR NUM_LAYER_LIST NOOP_LAYERS MODEL_TYPE_HF HF_CFG_DIR FORMAT PAD_HEAD_DIM VERIFY MERGE LORA_DIR LORA_R LORA_ALPHA
    # of generation and evaluation
    TASK TASK_DATA_PATH NUM_FEWSHOT BATCH HARNESS RAW SYSTEM TOOLS THINKING HISTORY_TURNS MAX_NEW_TOKENS TEMPERATURE
    TOP_K TOP_P ENGINE HOST PORT API_KEY API_BASE_URL API_MODEL
    # of reinforcement learning, and of the quickstart
    CONFIG SOCKET_IFNAME NODE_ADDR NUM_CPUS RAY_ADDRESS RAY_AUTH_MODE RAY_TMPDIR RAY_FLAGS WAIT_SECONDS
    QUICKSTART_PRETRAIN_ITERS QUICKSTART_SFT_ITERS QUICKSTART_TOOL_ITERS QUICKSTART_TOOL_MORE_ITERS QUICKSTART_TOOL_SEED LEAST
)
for name in "${SETTINGS[@]}"; do
    [ -z "${!name:-}" ] || OPTIONS+=(--env "$name")
done

if [ -n "$DRY_RUN" ]; then
    printf '%q ' "$DOCKER" "${OPTIONS[@]}" "$IMAGE" "$@"
    echo
    exit
fi
command -v "$DOCKER" > /dev/null || fail "no $DOCKER here; set DOCKER to podman or another that takes its options"
exec "$DOCKER" "${OPTIONS[@]}" "$IMAGE" "$@"
