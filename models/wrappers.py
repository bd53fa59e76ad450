"""What is around a model when it trains: data-parallel and precision wrappers."""

from __future__ import annotations

from typing import Any


def unwrap(chunk: Any) -> Any:
    """The GPTModel inside them."""
    while hasattr(chunk, "module"):
        chunk = chunk.module
    return chunk
