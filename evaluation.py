"""Evaluate; flags as MindSpeed-LLM's evaluation.py."""

from minimind_mcore.cli import program

if __name__ == "__main__":
    program(__file__)
