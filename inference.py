"""Generate and chat; flags as MindSpeed-LLM's inference.py."""

from minimind_mcore import errors
from minimind_mcore.inference import main

if __name__ == "__main__":
    errors.run(main.main)
