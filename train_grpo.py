"""Reinforcement learning of MiniMind by MindSpeed-RL's YAML: GRPO, and the algorithms that share its loop."""

from minimind_mcore.cli import program

if __name__ == "__main__":
    program(__file__)
