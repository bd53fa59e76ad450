#!/usr/bin/env bash
# Reinforcement learning of a MiniMind on one host.
#
#   bash examples/rlxf/grpo_minimind_single.sh                             # a tiny model learns to carry, on a CPU
#   CONFIG=grpo_minimind3 bash examples/rlxf/grpo_minimind_single.sh actor_config.lr=1e-6
#
# Ray is started for the run and ends with it; RAY_ADDRESS=HOST:PORT names a cluster to use instead.
# rlxf.sh has the settings.
source "$(dirname "${BASH_SOURCE[0]}")/rlxf.sh"

run rl single "$@"
