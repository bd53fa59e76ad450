"""Reinforcement learning of MiniMind by MindSpeed-RL's YAML: PPO, with a critic."""

from minimind_mcore.cli import program

if __name__ == "__main__":
    program(__file__)
