#!/usr/bin/env bash
# Reinforcement learning of a MiniMind on several hosts: this one leads, grpo_minimind_worker.sh runs on the others.
#
#   NNODES=2 bash examples/rlxf/grpo_minimind_head.sh                                # here
#   HEAD_ADDR=10.0.0.1 bash examples/rlxf/grpo_minimind_worker.sh                    # on the other
#
# NNODES       hosts to wait for, this one among them (default 1)
# HEAD_ADDR    this host's address, by which the others reach it (default: the one that Ray finds)
# The hosts must share the repository's folder (checkpoints, data). rlxf.sh has the other settings.
NODES=${NNODES:-1}
NNODES=1 # common.sh's is torchrun's
source "$(dirname "${BASH_SOURCE[0]}")/rlxf.sh"

start_ray --head --port "$RAY_PORT" --include-dashboard=false ${HEAD_ADDR:+--node-ip-address "$HEAD_ADDR"} \
    ${RAY_TMPDIR:+--temp-dir "$RAY_TMPDIR"}
export RAY_ADDRESS=${HEAD_ADDR:-127.0.0.1}:$RAY_PORT
"$PYTHON" -m minimind_mcore.rl.hosts wait --nodes "$NODES" --seconds "$WAIT_SECONDS"
run_training "$@"
