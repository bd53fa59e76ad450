"""Access to the GPTModel inside the wrappers for data parallelism and mixed precision."""

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
    """Restrict the output layer of a GPTModel to some positions within the context.

    Its logits are then [positions, 1, vocabulary / TP]. This does not work with sequence parallelism, where the output
    layer first gathers the positions of all ranks.

    Args:
        places: indices of the positions in the flattened axes [length * rows].
        chunk: the last chunk of the model.
    """

    def pick(module: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        # shape in megatron-core: [length, rows, hidden]
        return (inputs[0].flatten(0, 1).index_select(0, places).unsqueeze(1), *inputs[1:])

    with chunk.output_layer.register_forward_pre_hook(pick):
        yield
