"""MiniMind's YaRN: `inference_rope_scaling: true` stretches the rotary embedding for texts beyond 2048 tokens.

MiniMind trains without YaRN. Its class has one set of constants (model_minimind.py, since 2025-12-01) and no attention
temperature. Each frequency of a head is multiplied by 1 - r + r/16, where r rises from 0 to 1 between the frequencies
with 32 rotations and with one rotation in 2048 tokens (YaRN, arXiv:2309.00071).

This module imports no torch, because `config.py` does not.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

FACTOR, TRAINED_LENGTH, BETA_FAST, BETA_SLOW = 16.0, 2048, 32.0, 1.0

# Names of transformers and vLLM. Without attention_factor transformers multiplies cos and sin by 1.277.
PARAMETERS: dict[str, Any] = {
    "rope_type": "yarn",
    "factor": FACTOR,
    "original_max_position_embeddings": TRAINED_LENGTH,
    "beta_fast": BETA_FAST,
    "beta_slow": BETA_SLOW,
    "attention_factor": 1.0,
}
# vLLM and SGLang ignore attention_factor. They multiply by (0.1 ln(factor) + 1) * attn_factor.
SERVING = {"attn_factor": 1.0 / (0.1 * math.log(FACTOR) + 1.0)}


def is_ours(parameters: Mapping[str, Any]) -> bool:
    """Return whether the rope parameters of a config are MiniMind's. Keys that do not change the result may be
    absent."""
    found = dict(parameters)
    found["rope_type"] = found.get("rope_type", found.pop("type", None))
    optional = {"beta_fast": BETA_FAST, "beta_slow": BETA_SLOW}
    return all(found.get(key, optional.get(key)) == value for key, value in PARAMETERS.items()) and bool(
        found.get("truncate", True)
    )


def ramp(head_dim: int, theta: float) -> tuple[int, int]:
    """Return the indices of the frequencies between which r rises from 0 to 1, before the upper one is clamped."""

    def number(turns: float) -> float:
        return head_dim * math.log(TRAINED_LENGTH / (turns * 2 * math.pi)) / (2 * math.log(theta))

    return max(math.floor(number(BETA_FAST)), 0), math.ceil(number(BETA_SLOW))


def transformers_agrees(head_dim: int, theta: float) -> bool:
    """Return whether transformers computes the same: it clamps the upper index to head_dim - 1, MiniMind to half of
    it."""
    return ramp(head_dim, theta)[1] <= head_dim // 2 - 1


def factors(head_dim: int, theta: float) -> list[float]:
    """Return the multipliers of the head_dim / 2 frequencies of a head."""
    low, high = ramp(head_dim, theta)
    high = min(high, head_dim // 2 - 1)
    rises = (min(max((i - low) / max(high - low, 0.001), 0.0), 1.0) for i in range(head_dim // 2))
    return [1 - r + r / FACTOR for r in rises]
