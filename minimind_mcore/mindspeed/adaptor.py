"""This kit's own engine on an NPU: BACKEND=native there."""

from __future__ import annotations

import importlib
import importlib.util
import os

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
        # MindSpeed's operator is part of nnal: `minimind_mcore.fused` gives its own where there seems to be none
        layers._grad_accum_fusion_available = False  # type: ignore[attr-defined]
