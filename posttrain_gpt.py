"""Fine-tune, align or distil MiniMind; flags as MindSpeed-LLM's posttrain_gpt.py."""

from minimind_mcore.cli import program

if __name__ == "__main__":
    program(__file__)
