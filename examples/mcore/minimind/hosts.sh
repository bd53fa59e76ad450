# Sourced by common.sh: the hosts of a job and how they reach each other. Sets NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT.
# shellcheck shell=bash

# Each line of HOSTFILE begins with a host's name or address; "slots=8" and comments may follow. The first is the master.
read_hostfile() {
    local line host hosts=() here number
    [ -f "$HOSTFILE" ] || fail "HOSTFILE=$HOSTFILE: there is no such file"
    while IFS= read -r line || [ -n "$line" ]; do
        read -r host _ <<< "${line%%#*}"
        [ -z "${host:-}" ] || hosts+=("$host")
    done < "$HOSTFILE"
    [ "${#hosts[@]}" != 0 ] || fail "HOSTFILE=$HOSTFILE names no host; expected one a line"
    [ "${NNODES:-${#hosts[@]}}" = "${#hosts[@]}" ] ||
        fail "NNODES=$NNODES, but HOSTFILE=$HOSTFILE names ${#hosts[@]} hosts; leave NNODES out"
    NNODES=${#hosts[@]}
    MASTER_ADDR=${MASTER_ADDR:-${hosts[0]}}
    [ -z "${NODE_RANK:-}" ] || return 0
    here=" $(hostname) $(hostname -s 2> /dev/null) $(hostname -f 2> /dev/null) $(hostname -I 2> /dev/null) "
    for number in "${!hosts[@]}"; do
        [[ $here != *" ${hosts[$number]} "* ]] || { NODE_RANK=$number && return 0; }
    done
    fail "this host ($(hostname)) is not in HOSTFILE=$HOSTFILE (${hosts[*]}); name it there as \`hostname\` does, or set NODE_RANK"
}

# The network of a job on several hosts. HCCL, which connects the NPUs, and gloo, which connects the processes, each
# choose an interface by themselves, and on a host with several (docker0, a management network) not always the same:
# then every rank waits for the others until a timeout. So the interface that leads to MASTER_ADDR is named to both.
#   HCCL_SOCKET_IFNAME  interface of HCCL's handshake      GLOO_SOCKET_IFNAME  that of gloo
#   HCCL_IF_IP          this host's address on it
name_network() {
    local route interface=${HCCL_SOCKET_IFNAME:-${GLOO_SOCKET_IFNAME:-}} address=
    if [ -z "$interface" ] && command -v ip > /dev/null; then
        # on the master itself the route is lo: what matters there is the interface that has the address
        route=$(ip -o route get "$(numeric "$MASTER_ADDR")" 2> /dev/null) || route=
        [[ ! $route =~ src\ ([^ ]+) ]] || address=${BASH_REMATCH[1]}
        [ -z "$address" ] || interface=$(ip -o -4 addr show | awk -v a="$address" '{split($4, p, "/")} p[1] == a {print $2; exit}')
    fi
    [ -n "$interface" ] || fail "no route from this host to MASTER_ADDR=$MASTER_ADDR is known; set HCCL_SOCKET_IFNAME to" \
        "the interface that leads there (\`ip addr\` lists them)"
    export HCCL_SOCKET_IFNAME=${HCCL_SOCKET_IFNAME:-$interface} GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-$interface}
    check_interface HCCL_SOCKET_IFNAME
    check_interface GLOO_SOCKET_IFNAME
    [ -z "$address" ] || export HCCL_IF_IP=${HCCL_IF_IP:-$address}
    [ -z "${HCCL_IF_IP:-}" ] || [[ " $(hostname -I 2> /dev/null) 127.0.0.1 " == *" $HCCL_IF_IP "* ]] ||
        fail "HCCL_IF_IP=$HCCL_IF_IP is no address of this host ($(hostname -I)); it differs from host to host"
    echo "network: HCCL_SOCKET_IFNAME=$HCCL_SOCKET_IFNAME HCCL_IF_IP=${HCCL_IF_IP:-} GLOO_SOCKET_IFNAME=$GLOO_SOCKET_IFNAME" >&2
}

# numeric NAME: its IPv4 address; the name itself where it has none.
numeric() {
    local found
    found=$(getent ahostsv4 "$1" 2> /dev/null | awk 'NR == 1 {print $1}') || found=
    printf '%s\n' "${found:-$1}"
}

# HCCL also takes prefixes (eth), exact names (=eth0) and lists of either; gloo takes lists of names.
check_interface() {
    local name value=${!1} known
    known=$(cd /sys/class/net && echo *)
    for name in ${value//,/ }; do
        [[ $name == ^* ]] && continue # what not to take
        name=${name#=}
        [[ " $known" == *" $name"* ]] || fail "$1=$value: this host has no interface $name; it has $known"
    done
}

[ -z "${HOSTFILE:-}" ] || read_hostfile
NNODES=${NNODES:-1}
NODE_RANK=${NODE_RANK:-0}
[ "$NNODES" = 1 ] || [ -n "${MASTER_ADDR:-}" ] ||
    fail "NNODES=$NNODES needs MASTER_ADDR, the address of the host with NODE_RANK=0"
[[ $NODE_RANK =~ ^[0-9]+$ ]] && [ "$NODE_RANK" -lt "$NNODES" ] ||
    fail "NODE_RANK=$NODE_RANK: expected 0 to $((NNODES - 1)), a number of its own for each of NNODES=$NNODES hosts"
MASTER_ADDR=${MASTER_ADDR:-127.0.0.1}
if [ -z "${MASTER_PORT:-}" ]; then
    MASTER_PORT=29500
    # so that two runs on a host do not meet
    [ "$NNODES" != 1 ] ||
        MASTER_PORT=$("$PYTHON" -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')
fi
[ "$NNODES" = 1 ] || [ "$DEVICE" != npu ] || name_network
