"""Call Ray actors without ever hanging: a deadline, errors that name the dead actors, and actors in their place."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError, RayTaskError

from minimind_mcore.errors import UserError
from minimind_mcore.rl.runtime.metrics import say

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


def collect(refs: Sequence[Any], names: Sequence[str], what: str, timeout: float) -> list[Any]:
    """What the calls return, in their order.

    Args:
        refs: of one call to each actor.
        names: of the actors.
        what: they do, for messages.
        timeout: seconds that all of it may take.

    Raises:
        Lost: an actor died, or does not answer by the deadline.
        UserError: as the actor raised it.
        RuntimeError: another error in an actor; its traceback is in the message.
    """
    named, found, began = dict(zip(refs, names, strict=True)), dict[Any, Any](), time.monotonic()
    waiting, deadline, due = list(refs), began + timeout, SAY_AFTER_SECONDS
    while waiting:
        done, waiting = ray.wait(waiting, num_returns=1, timeout=POLL_SECONDS, fetch_local=False)
        for ref in done:
            found[ref] = _result(ref, named, waiting, what, deadline)
        now = time.monotonic()
        if waiting and now - began > due:
            due *= 2
            slow = ", ".join(named[ref] for ref in waiting)
            quick = ", ".join(named[ref] for ref in refs if ref not in waiting)
            say(
                f"the driver is waiting for {slow} ({what}, {now - began:.0f} of {timeout:g} s"
                f"{f'; {quick} answered' if quick else ''})"
            )
        if waiting and now > deadline:
            raise Lost([named[ref] for ref in waiting], f"no answer within {timeout:g} s ({what})")
    return [found[ref] for ref in refs]


def _result(ref: Any, named: dict[Any, str], waiting: list[Any], what: str, deadline: float) -> Any:
    name = named[ref]
    try:
        return ray.get(ref, timeout=max(POLL_SECONDS, deadline - time.monotonic()))
    except GetTimeoutError as error:
        raise Lost([name], f"its answer did not arrive in time ({what})") from error
    except RayTaskError as error:
        if isinstance(error.cause, RayError):  # weights of a rank that has died since
            raise Lost([name], f"what it was given is lost ({what})") from error
        if dead := _dead(waiting, named):
            raise Lost(dead, f"died ({what})") from error
        if isinstance(error.cause, UserError):
            raise UserError(str(error.cause)) from error
        raise RuntimeError(f"{name} failed ({what}):\n{error}") from error
    except RayError as error:  # the actor, its process or its node is gone
        raise Lost([name], f"died ({what}): {str(error).splitlines()[0]}") from error


def _dead(waiting: list[Any], named: dict[Any, str]) -> list[str]:
    """Actors that are known to have died within the next seconds."""
    end = time.monotonic() + GRACE_SECONDS
    while waiting and time.monotonic() < end:
        done, waiting = ray.wait(waiting, num_returns=1, timeout=POLL_SECONDS, fetch_local=False)
        for ref in done:
            try:
                ray.get(ref, timeout=POLL_SECONDS)
            except RayActorError:
                return [named[ref]]
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


class Restarts:
    """How often the actors of a kind may be replaced, without a new step between, before the run gives up.

    A rare fault never ends a run, however long; one that comes back at the same step does.

    Args:
        kind: of actors, for messages.
        most: how often.
        say: where it is told.
        wait: until there is a place for another.
    """

    def __init__(self, kind: str, most: int, say: Callable[[str], None], wait: Callable[[], None]) -> None:
        self.kind, self.most, self.say, self.wait = kind, most, say, wait
        self.count = self.furthest = 0

    def finished(self, step: int) -> None:
        """A step is done; the count begins anew, unless it is one that is done again after a restart."""
        if step > self.furthest:
            self.furthest, self.count = step, 0

    def another(self, error: Lost) -> None:
        """Count one.

        Raises:
            UserError: it is one too many.
        """
        self.count += 1
        if self.count > self.most:
            raise UserError(
                f"{self.kind}: {error}. Replaced {self.most} times already without a new step between "
                "(minimind.max_restarts): giving up; the checkpoints are whole, the same command goes on from the last"
            ) from error
        self.say(f"{self.kind}: {error}; replacing it ({self.count} of {self.most})")
        self.wait()


class ActorPool:
    """Actors that each take parts of the work; one that dies is replaced, and its part done again.

    Args:
        kind: what they are, for messages.
        start: makes the i-th actor.
        count: of actors.
        timeout: seconds that a call may take.
        restarts: see `Restarts`.
    """

    def __init__(self, kind: str, start: Callable[[int], Any], count: int, timeout: float, restarts: Restarts) -> None:
        self.kind, self.start, self.timeout, self.restarts = kind, start, timeout, restarts
        self.actors = [start(i) for i in range(count)]

    def __len__(self) -> int:
        return len(self.actors)

    def submit(self, method: str, parts: Sequence[tuple[Any, ...]]) -> PoolCall:
        """Call a method with the arguments of each part; part i goes to actor i (modulo their number)."""
        return PoolCall(self, method, list(parts))

    def run(self, method: str, parts: Sequence[tuple[Any, ...]]) -> list[Any]:
        """`submit`, and wait for what it returns."""
        return self.submit(method, parts).result()

    def everywhere(self, method: str, *arguments: Any) -> list[Any]:
        """The same call to every actor."""
        return self.run(method, [arguments] * len(self.actors))

    def name(self, number: int) -> str:
        """Of an actor, for messages."""
        return f"{self.kind} {number}"

    def replace(self, number: int) -> None:
        """End an actor, if it still is, and start another in its place."""
        stop([self.actors[number]])
        self.actors[number] = self.start(number)

    def close(self) -> None:
        """End all."""
        stop(self.actors)


class PoolCall:
    """A call to the actors of a pool that is under way."""

    def __init__(self, pool: ActorPool, method: str, parts: list[tuple[Any, ...]]) -> None:
        self.pool, self.method, self.parts = pool, method, parts
        self.started = time.monotonic()
        self.refs = [self._call(i) for i in range(len(parts))]

    def _call(self, part: int) -> Any:
        actor = self.pool.actors[part % len(self.pool)]
        return getattr(actor, self.method).remote(*self.parts[part])

    def result(self) -> list[Any]:
        """What the actors return, part by part; the parts of actors that died are done again.

        Raises:
            UserError: as an actor raised it, or the actors died too often.
        """
        found: list[Any] = [None] * len(self.parts)
        missing = list(range(len(self.parts)))
        while missing:
            lost: dict[int, Lost] = {}
            for part in missing:
                owner = part % len(self.pool)
                try:
                    name = self.pool.name(owner)
                    (found[part],) = collect([self.refs[part]], [name], self.method, self.pool.timeout)
                except Lost as error:
                    lost.setdefault(owner, error)
            missing = [part for part in missing if part % len(self.pool) in lost and found[part] is None]
            for owner, loss in lost.items():
                self.pool.replace(owner)  # it waits for its place, should a host have been lost
                self.pool.restarts.another(loss)
            for part in missing:
                self.refs[part] = self._call(part)
        return found
