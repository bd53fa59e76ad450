#!/usr/bin/env bash
# Train a MiniMind with reinforcement learning on one host.
#
#   bash examples/rlxf/grpo_minimind_single.sh                             # a tiny model learns to carry, on a CPU
#   CONFIG=grpo_minimind3 bash examples/rlxf/grpo_minimind_single.sh actor_config.lr=1e-6
#
# The script starts Ray, and stops it after the run. RAY_ADDRESS=HOST:PORT uses an existing cluster instead.
# rlxf.sh has the settings.
source "$(dirname "${BASH_SOURCE[0]}")/rlxf.sh"

run rl single "$@"
