#!/usr/bin/env bash
# Reinforcement learning of a MiniMind on several hosts: this one leads, grpo_minimind_worker.sh runs on the others.
#
#   NNODES=2 bash examples/rlxf/grpo_minimind_head.sh                                # here; it says what to run there:
#   MASTER_ADDR=10.0.0.1 bash examples/rlxf/grpo_minimind_worker.sh                  # on the other
#
# NNODES       hosts to wait for, this one among them (default 1)
# MASTER_ADDR  this host's address, by which the others reach it (default: that of SOCKET_IFNAME, or of the way out)
# rlxf.sh has the other settings. docs/rl_cluster.md says what the hosts must share, and what messages mean.
source "$(dirname "${BASH_SOURCE[0]}")/rlxf.sh"

run rl head "$@"
