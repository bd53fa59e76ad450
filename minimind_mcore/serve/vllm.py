"""vLLM as the engine of `minimind-mcore serve`."""

from __future__ import annotations

import importlib.util

from minimind_mcore.checkpoint.source import Source
from minimind_mcore.errors import UserError
from minimind_mcore.preprocess.tokenize import TokenizerInfo
from minimind_mcore.serve.engines import Options


def problem(source: Source) -> str | None:
    """Why vLLM cannot serve a model here; None if it can."""
    if importlib.util.find_spec("vllm") is None:
        return "vLLM is not installed"
    return f"vLLM's settings for {source.kind} are not known yet"


def run(source: Source, info: TokenizerInfo, options: Options) -> int:
    """Serve until a signal.

    Raises:
        UserError: `problem` has one.
    """
    raise UserError(f"ENGINE=vllm: {problem(source)}")
