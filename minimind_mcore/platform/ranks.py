"""Agreement between the ranks of a run. Without process groups each function acts on a single process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from minimind_mcore.errors import UserError

T = TypeVar("T")


def rank() -> int:
    """Return the rank of this process."""
    return dist.get_rank() if dist.is_initialized() else 0


def is_main() -> bool:
    """Return whether this is the process that writes logs and pictures."""
    return rank() == 0


def gather(value: T, group: Any = None) -> list[T]:
    """Return the values of all ranks of a group, or of the run, in rank order. Collective."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values


def from_main(work: Callable[[], T]) -> T:
    """Run `work` on the main rank, and return its result on every rank. Collective."""
    if not dist.is_initialized():
        return work()
    box: list[Any] = [work() if is_main() else None]
    dist.broadcast_object_list(box, src=0)
    return box[0]  # type: ignore[no-any-return]


def together(work: Callable[[], T]) -> list[T]:
    """Run `work` on every rank, and gather the results. If it raises a `UserError` on one rank, all ranks raise it.

    A rank that failed alone would leave the others waiting. Collective.

    Raises:
        UserError: `work` raised it. With several errors, the one of the lowest rank.
    """
    found: T | UserError
    try:
        found = work()
    except UserError as error:
        found = error
    results = gather(found)
    for result in results:
        if isinstance(result, UserError):
            raise result
    return results  # type: ignore[return-value]


def check_on_main(check: Callable[[], None]) -> None:
    """Run a check on the main rank only. If it raises a `UserError`, every rank raises it. Collective."""
    together(lambda: check() if is_main() else None)
