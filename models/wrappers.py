"""The wrappers around a model in training: data parallel and precision."""

from __future__ import annotations

from typing import Any


def unwrap(chunk: Any) -> Any:
    """Return the GPTModel inside the wrappers."""
    while hasattr(chunk, "module"):
        chunk = chunk.module
    return chunk
