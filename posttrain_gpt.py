"""Fine-tune, align or distil MiniMind; flags as MindSpeed-LLM's posttrain_gpt.py."""

from minimind_mcore import errors
from minimind_mcore.posttrain import main

if __name__ == "__main__":
    errors.run(main.main)
