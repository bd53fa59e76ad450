#!/usr/bin/env bash
# Join this host to the cluster of grpo_minimind_head.sh until the run ends. After a lost host, run this script again.
#
#   MASTER_ADDR=10.0.0.1 bash examples/rlxf/grpo_minimind_worker.sh
#
# MASTER_ADDR  address of the head (MASTER_PORT: its port)
# NODE_ADDR    address of this host (default: the address of SOCKET_IFNAME, or of the route to the head)
# rlxf.sh has the other settings.
source "$(dirname "${BASH_SOURCE[0]}")/rlxf.sh"

run rl worker "$@"
