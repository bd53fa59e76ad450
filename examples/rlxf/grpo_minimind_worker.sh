#!/usr/bin/env bash
# Lends this host to the run that grpo_minimind_head.sh leads, until that ends. Run it again after the host was lost.
#
#   MASTER_ADDR=10.0.0.1 bash examples/rlxf/grpo_minimind_worker.sh
#
# MASTER_ADDR  the head's address (MASTER_PORT: its port)
# NODE_ADDR    this host's address (default: that of SOCKET_IFNAME, or of the way to the head)
# rlxf.sh has the other settings.
source "$(dirname "${BASH_SOURCE[0]}")/rlxf.sh"

run rl worker "$@"
