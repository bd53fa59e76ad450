"""Reinforcement learning of MiniMind by MindSpeed-RL's YAML: GRPO, and the algorithms that share its loop."""

from minimind_mcore import errors
from minimind_mcore.rl import main

if __name__ == "__main__":
    errors.run(main.grpo)
