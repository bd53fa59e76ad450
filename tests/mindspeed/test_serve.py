"""The embedded server under REHEARSE=1."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx  # pyright: ignore[reportMissingImports]
from helpers.rehearsal import SCRIPTS, Inputs
from helpers.serving import embedded, until_serving


def test_the_script_serves_the_tokens_of_a_cpu(inputs: Inputs, weights: Callable[..., Path]) -> None:
    """From a Megatron checkpoint of two tensor-parallel ranks."""
    settings = {"REHEARSE": "1", "NPU_EMULATION_STRICT": "raise", "PORT": "0", "PRECISION": "fp32"}
    settings |= inputs.environment | {"LOAD_DIR": str(weights("minimind3", tp=2))}
    body: dict[str, Any] = {
        "messages": [{"role": "user", "content": "the robot 学习"}],
        "max_tokens": 24,
        "temperature": 0,
    }
    body |= {"return_token_ids": True, "ignore_eos": True}
    process = subprocess.Popen(
        ["bash", str(SCRIPTS / "serve_minimind.sh")], env=os.environ | settings,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    try:
        address, said = until_serving(process)
        assert "rehearsal: on the CPU" in said and "embedded: the default on an NPU" in said and "fp32 on npu" in said
        reply = httpx.post(f"{address}/v1/chat/completions", json=body, timeout=60).json()
        with embedded(inputs.model("minimind3")) as (other, _):
            expected = httpx.post(f"{other}/v1/chat/completions", json=body, timeout=60).json()
        assert reply["choices"][0]["token_ids"] == expected["choices"][0]["token_ids"]
        assert reply["usage"] == expected["usage"] and reply["usage"]["completion_tokens"] == 24
    finally:
        process.terminate()
        assert process.wait(60) == 0
