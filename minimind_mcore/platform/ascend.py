"""MindSpeed: what it patches for the kit's own engine on an NPU, and what the layer spec takes from it."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from typing import Any

from minimind_mcore.errors import UserError


def adapt() -> None:
    """Let MindSpeed patch megatron-core for the NPU. Before megatron is imported.

    Raises:
        UserError: MindSpeed is not installed.
    """
    if importlib.util.find_spec("mindspeed") is None:
        raise UserError("an NPU needs MindSpeed, which is not installed: docs/install_ascend.md says how to install it")
    importlib.import_module("torch_npu.contrib.transfer_to_npu")
    importlib.import_module("mindspeed.megatron_adaptor")
    if not os.environ.get("ATB_HOME_PATH"):  # set by nnal's set_env.sh
        layers = importlib.import_module("megatron.core.tensor_parallel.layers")
        # MindSpeed's operator is part of nnal; `patches.py` gives its own where there seems to be none.
        layers._grad_accum_fusion_available = False  # type: ignore[attr-defined]


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
