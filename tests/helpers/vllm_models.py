"""Presets that are small enough for vLLM on a CPU."""

from __future__ import annotations

from dataclasses import replace

from minimind_mcore.models.config import ModelConfig
from minimind_mcore.models.presets import PRESETS

NAMES = ["minimind3", "minimind3_moe", "minimind2_small", "minimind2", "minimind2_moe", "minimind2_moe_768"]
PADDED = ["minimind3", "minimind3_moe", "minimind2_small", "minimind2"]  # vLLM's Qwen2-MoE ignores head_dim
VOCABULARY = 160


def shrunk(name: str) -> ModelConfig:
    """A preset with its own head size and number of heads, and little else."""
    config = PRESETS[name]
    moe = config.moe and replace(
        config.moe, ffn_hidden_size=96, shared_ffn_hidden_size=96 if config.moe.shared_ffn_hidden_size else 0
    )
    hidden = config.num_heads * config.head_dim if name.startswith("minimind2_moe") else 64  # see PADDED
    return config.replace(vocab_size=VOCABULARY, hidden_size=hidden, num_layers=2, ffn_hidden_size=96, moe=moe)
