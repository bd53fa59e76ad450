"""Convert weights between MiniMind, Hugging Face and Megatron; flags as MindSpeed-LLM's convert_ckpt_v2.py."""

from minimind_mcore.cli import program

if __name__ == "__main__":
    program(__file__)
