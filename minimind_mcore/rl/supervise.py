"""Waiting for Ray actors without ever hanging: a deadline, a look at who is alive, and errors that say who is not."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError, RayTaskError

from minimind_mcore.errors import UserError
from minimind_mcore.rl.metrics import say as tell

POLL_SECONDS = 1.0
SAY_AFTER_SECONDS = 30.0  # of a call; then after twice as long, and so on: an update of a large model takes minutes
# When a rank dies its neighbours often fail first, in a collective: so long the news of the death may take.
GRACE_SECONDS = 15.0


class Lost(Exception):
    """Actors that died, or did not answer in time.

    Attributes:
        names: of them.
    """

    def __init__(self, names: Sequence[str], why: str) -> None:
        super().__init__(f"{', '.join(names)}: {why}")
        self.names = list(names)


def collect(
    refs: Sequence[Any], names: Sequence[str], what: str, timeout: float, say: Callable[[str], None] = tell
) -> list[Any]:
    """What the calls return, in their order.

    Args:
        refs: of one call to each actor.
        names: of the actors.
        what: they do, for messages.
        timeout: seconds that all of it may take.
        say: where to tell, every so often, which actors the driver waits for.

    Raises:
        Lost: an actor died, or does not answer by the deadline.
        UserError: as the actor raised it.
        RuntimeError: another error in an actor; its traceback is in the message.
    """
    place = {ref: i for i, ref in enumerate(refs)}
    found: list[Any] = [None] * len(refs)
    began = time.monotonic()
    waiting, deadline, due = list(refs), began + timeout, SAY_AFTER_SECONDS
    while waiting:
        done, waiting = ray.wait(waiting, num_returns=1, timeout=POLL_SECONDS, fetch_local=False)
        for ref in done:
            found[place[ref]] = _result(ref, names[place[ref]], waiting, place, names, what, deadline)
        now = time.monotonic()
        if waiting and now - began > due:
            due *= 2
            slow = ", ".join(names[place[ref]] for ref in waiting)
            quick = ", ".join(names[place[ref]] for ref in refs if ref not in waiting)
            say(
                f"the driver is waiting for {slow} ({what}, {now - began:.0f} of {timeout:g} s"
                f"{f'; {quick} answered' if quick else ''})"
            )
        if waiting and now > deadline:
            late = [names[place[ref]] for ref in waiting]
            raise Lost(late, f"no answer within {timeout:g} s ({what})")
    return found


def _result(
    ref: Any, name: str, waiting: list[Any], place: dict[Any, int], names: Sequence[str], what: str, deadline: float
) -> Any:
    try:
        return ray.get(ref, timeout=max(POLL_SECONDS, deadline - time.monotonic()))
    except GetTimeoutError as error:
        raise Lost([name], f"its answer did not arrive in time ({what})") from error
    except RayTaskError as error:
        if isinstance(error.cause, RayError):  # weights of a rank that has died since
            raise Lost([name], f"what it was given is lost ({what})") from error
        dead = _dead(waiting, place, names)
        if dead:
            raise Lost(dead, f"died ({what})") from error
        if isinstance(error.cause, UserError):
            raise UserError(str(error.cause)) from error
        raise RuntimeError(f"{name} failed ({what}):\n{error}") from error
    except RayError as error:  # the actor, its process or its node is gone
        raise Lost([name], f"died ({what}): {str(error).splitlines()[0]}") from error


def _dead(waiting: list[Any], place: dict[Any, int], names: Sequence[str]) -> list[str]:
    """Actors that are known to have died within the next seconds."""
    end = time.monotonic() + GRACE_SECONDS
    while waiting and time.monotonic() < end:
        done, waiting = ray.wait(waiting, num_returns=1, timeout=POLL_SECONDS, fetch_local=False)
        for ref in done:
            try:
                ray.get(ref, timeout=POLL_SECONDS)
            except RayActorError:
                return [names[place[ref]]]
            except RayError:
                continue
    return []


def require_alive(actors: Sequence[Any], names: Sequence[str]) -> None:
    """Ask who is alive; one that is busy is.

    Raises:
        Lost: an actor is dead.
    """
    refs = [actor.__ray_ready__.remote() for actor in actors]
    done = ray.wait(refs, num_returns=len(refs), timeout=POLL_SECONDS)[0] if refs else []
    dead = []
    for ref, name in zip(refs, names, strict=False):
        try:
            if ref in done:
                ray.get(ref)
        except RayError:
            dead.append(name)
    if dead:
        raise Lost(dead, "died")


def stop(actors: Sequence[Any]) -> None:
    """End actors that this run started, dead or alive."""
    for actor in actors:
        ray.kill(actor, no_restart=True)
