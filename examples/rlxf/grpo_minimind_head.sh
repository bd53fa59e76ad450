#!/usr/bin/env bash
# Train a MiniMind with reinforcement learning on several hosts. This host is the head of the Ray cluster;
# grpo_minimind_worker.sh runs on the others.
#
#   NNODES=2 bash examples/rlxf/grpo_minimind_head.sh                                # on this host; prints the command below
#   MASTER_ADDR=10.0.0.1 bash examples/rlxf/grpo_minimind_worker.sh                  # on each other host
#
# NNODES       number of hosts, including this one (default 1)
# MASTER_ADDR  address by which the other hosts reach this one (default: the address of SOCKET_IFNAME or the default route)
# rlxf.sh has the other settings. docs/rl_cluster.md describes what the hosts must share.
source "$(dirname "${BASH_SOURCE[0]}")/rlxf.sh"

run rl head "$@"
