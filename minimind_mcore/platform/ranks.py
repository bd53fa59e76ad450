"""What the ranks of a run agree on. Without process groups each function is that of a single process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from minimind_mcore.errors import UserError

T = TypeVar("T")


def rank() -> int:
    """Rank of this process."""
    return dist.get_rank() if dist.is_initialized() else 0


def is_main() -> bool:
    """True in the one process that writes logs and pictures."""
    return rank() == 0


def gather(value: T, group: Any = None) -> list[T]:
    """The values of all ranks of a group, or of the run, in the order of the ranks. Collective."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values


def from_main(work: Callable[[], T]) -> T:
    """What `work` returns on the main rank, on every rank. Collective."""
    if not dist.is_initialized():
        return work()
    box: list[Any] = [work() if is_main() else None]
    dist.broadcast_object_list(box, src=0)
    return box[0]  # type: ignore[no-any-return]


def together(work: Callable[[], T]) -> list[T]:
    """Run `work` on every rank and gather what it returns. If it refuses something on one rank, all refuse it.

    A rank that failed alone would leave the others waiting for it. Collective.

    Raises:
        UserError: `work` raised it; with several, the error of the lowest rank.
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
    """Run a check on the main rank alone; what it refuses, every rank refuses. Collective."""
    together(lambda: check() if is_main() else None)
