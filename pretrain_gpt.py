"""Pretrain MiniMind; flags as Megatron's and MindSpeed-LLM's pretrain_gpt.py."""

from minimind_mcore import errors
from minimind_mcore.training import pretrain

if __name__ == "__main__":
    errors.run(pretrain.main)
