"""Epochs, mini-batches and micro-batches of one step's experience."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from minimind_mcore.errors import UserError


def uneven(prompts: int, mini_batch_size: int) -> str | None:
    """Return a message if the mini-batch size does not divide the prompts of a step, else None."""
    if mini_batch_size > 0 and prompts % mini_batch_size == 0:
        return None
    return (
        f"found {mini_batch_size}, expected a divisor of global_batch_size {prompts} (mini_batch_size counts prompts, "
        "not responses: MindSpeed-RL multiplies it by n_samples_per_prompt)"
    )


def mini_batches(
    prompts: int, n_samples: int, mini_batch_size: int, epochs: int = 1, shuffle: bool = False, seed: int = 0
) -> Iterator[Tensor]:
    """Yield the row numbers of each mini-batch (one optimizer step). An epoch contains every response once.

    Args:
        prompts: prompts of the step (`global_batch_size`).
        n_samples: responses of a prompt (`n_samples_per_prompt`), neighbours in the batch.
        mini_batch_size: prompts of a mini-batch, as in MindSpeed-RL. A mini-batch has n_samples rows per prompt.
        epochs: passes over the responses of the step.
        shuffle: draw a new order of the responses each epoch (`shuffle_mini_batch`), the same on every rank.
        seed: seed of that order. Pass another seed each step.

    Yields:
        [mini_batch_size * n_samples] int64.

    Raises:
        UserError: `prompts` is not a multiple of `mini_batch_size`.
    """
    if message := uneven(prompts, mini_batch_size):
        raise UserError(f"mini_batch_size: {message}")
    order = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        rows = torch.randperm(prompts * n_samples, generator=order) if shuffle else torch.arange(prompts * n_samples)
        yield from torch.split(rows, mini_batch_size * n_samples)


def token_batches(lengths: Sequence[int], budget: int, rows: int | None = None, unit: int = 1) -> list[list[int]]:
    """Split rows into micro-batches of at most `budget` tokens, padding included.

    Args:
        lengths: tokens of each row, sorted by length.
        budget: maximum of rows times the longest row in a micro-batch. A row that is longer gets its own micro-batch.
        rows: maximum number of rows of a micro-batch. None: no maximum.
        unit: the number of micro-batches is a multiple of `unit`. The number of rows must be one too.

    Returns:
        Row numbers of each micro-batch.
    """
    parts: list[list[int]] = []
    longest = 0
    for row, length in enumerate(lengths):
        longest = max(longest, length)
        if not parts or (len(parts[-1]) + 1) * longest > budget or len(parts[-1]) == rows:
            parts.append([])
            longest = length
        parts[-1].append(row)
    while len(parts) % unit:
        place = max(range(len(parts)), key=lambda i: len(parts[i]))
        half = len(parts[place]) // 2
        parts[place : place + 1] = [parts[place][:half], parts[place][half:]]
    return parts
