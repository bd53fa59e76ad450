"""What the layer spec takes from MindSpeed where MindSpeed runs."""

from __future__ import annotations

import sys
from typing import Any


def active() -> bool:
    """Whether MindSpeed-LLM has patched megatron-core in this process.

    Not where this kit's own engine runs with MindSpeed: its layers would look for MindSpeed-LLM's arguments.
    """
    return "mindspeed_llm.tasks.megatron_adaptor_v2" in sys.modules


def norm(config: Any, hidden_size: int, eps: float) -> Any:
    """MindSpeed-LLM's RMSNorm: it accepts sequence parallelism and runs the fused kernel."""
    from mindspeed_llm.core.transformer.custom_layers.transformer_engine import (  # pyright: ignore[reportMissingImports]
        PTNorm,
    )

    return PTNorm(config=config, hidden_size=hidden_size, eps=eps)
