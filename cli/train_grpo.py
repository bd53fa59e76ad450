"""Reinforcement learning of MiniMind by MindSpeed-RL's YAML, at the path of MindSpeed-RL's program."""

import runpy
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    runpy.run_path(str(Path(sys.path[0], Path(__file__).name)), run_name="__main__")
