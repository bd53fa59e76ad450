"""The GPTModel inside the wrappers of training (data parallel and precision), and the positions that it computes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import Tensor


def unwrap(chunk: Any) -> Any:
    """Return the GPTModel inside the wrappers."""
    while hasattr(chunk, "module"):
        chunk = chunk.module
    return chunk


@contextlib.contextmanager
def output_only_at(places: Tensor, chunk: Any) -> Iterator[None]:
    """Within the context the output layer of a GPTModel computes only some positions, [positions, 1, vocabulary / TP].

    Not for sequence parallelism, where the output layer gathers the positions of all ranks first.

    Args:
        places: the positions, an index into [length * rows].
        chunk: the last chunk of the model.
    """

    def pick(module: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        # shape in megatron-core: [length, rows, hidden]
        return (inputs[0].flatten(0, 1).index_select(0, places).unsqueeze(1), *inputs[1:])

    handle = chunk.output_layer.register_forward_pre_hook(pick)
    yield
    handle.remove()
