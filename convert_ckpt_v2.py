"""Convert weights between MiniMind, Hugging Face and Megatron; flags as MindSpeed-LLM's convert_ckpt_v2.py."""

from minimind_mcore.converters.cli import main_v2
from minimind_mcore.errors import run

if __name__ == "__main__":
    run(main_v2)
