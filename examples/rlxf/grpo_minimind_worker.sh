#!/usr/bin/env bash
# Lends this host to the run that grpo_minimind_head.sh leads, until that ends.
#
#   HEAD_ADDR=10.0.0.1 bash examples/rlxf/grpo_minimind_worker.sh
#
# HEAD_ADDR    the head's address (RAY_PORT: its port)
# NODE_ADDR    this host's address (default: the one that Ray finds)
# rlxf.sh has the other settings.
[ -n "${HEAD_ADDR:-}" ] || {
    echo "error: HEAD_ADDR is not set: give the address of the host that runs grpo_minimind_head.sh" >&2
    exit 1
}
source "$(dirname "${BASH_SOURCE[0]}")/rlxf.sh"

export RAY_ADDRESS=$HEAD_ADDR:$RAY_PORT
"$PYTHON" -m minimind_mcore.rl.hosts reach --seconds "$WAIT_SECONDS"
start_ray --address "$RAY_ADDRESS" ${NODE_ADDR:+--node-ip-address "$NODE_ADDR"}
"$PYTHON" -m minimind_mcore.rl.hosts follow
