"""Some actors that do the same: called together, replaced one by one or all at once."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from minimind_mcore.errors import UserError
from minimind_mcore.rl import supervise
from minimind_mcore.rl.supervise import Lost, collect


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


class Pool:
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

    def submit(self, method: str, parts: Sequence[tuple[Any, ...]]) -> Task:
        """Call a method with the arguments of each part; part i goes to actor i (modulo their number)."""
        return Task(self, method, list(parts))

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
        supervise.stop([self.actors[number]])
        self.actors[number] = self.start(number)

    def close(self) -> None:
        """End all."""
        supervise.stop(self.actors)


class Task:
    """A call to the actors of a pool that is under way."""

    def __init__(self, pool: Pool, method: str, parts: list[tuple[Any, ...]]) -> None:
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
