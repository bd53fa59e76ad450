"""Pretrain MiniMind; flags as Megatron's and MindSpeed-LLM's pretrain_gpt.py."""

from minimind_mcore.cli import program

if __name__ == "__main__":
    program(__file__)
