"""Call Ray actors with a deadline, name the actors that died, and replace them."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError, RayTaskError

from minimind_mcore.errors import UserError
from minimind_mcore.rl.runtime.metrics import say

POLL_SECONDS = 1.0
SAY_AFTER_SECONDS = 30.0  # first report of a slow call, then at double the time: updates of large models take minutes
# When a rank dies, other ranks often fail first in a collective. Ray's report of the death may take this long.
GRACE_SECONDS = 15.0
LONGEST_SECONDS = 30 * 24 * 3600.0  # of a call whose parts have deadlines of their own


class Lost(Exception):
    """Actors died, or did not answer in time.

    Attributes:
        names: names of the actors.
    """

    def __init__(self, names: Sequence[str], why: str) -> None:
        super().__init__(f"{', '.join(names)}: {why}")
        self.names = list(names)


def collect(refs: Sequence[Any], names: Sequence[str], what: str, timeout: float) -> list[Any]:
    """Return the results of calls, in the order of `refs`.

    Args:
        refs: one call to each actor.
        names: names of the actors.
        what: what the calls do, for messages.
        timeout: seconds for all calls together.

    Raises:
        Lost: an actor died, or did not answer by the deadline.
        UserError: an actor raised it.
        RuntimeError: an actor raised another error. The message has its traceback.
    """
    named, found, began = dict(zip(refs, names, strict=True)), dict[Any, Any](), time.monotonic()
    waiting, deadline, due = list(refs), began + timeout, SAY_AFTER_SECONDS
    limit = f" of {timeout:g}" if timeout < LONGEST_SECONDS else ""
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
                f"the driver is waiting for {slow} ({what}, {now - began:.0f}{limit} s"
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
        if isinstance(error.cause, RayError):  # an argument, such as weights of a rank that has died
            raise Lost([name], f"what it was given is lost ({what})") from error
        if dead := _dead(waiting, named):
            raise Lost(dead, f"died ({what})") from error
        if isinstance(error.cause, UserError):
            raise UserError(str(error.cause)) from error
        raise RuntimeError(f"{name} failed ({what}):\n{error}") from error
    except RayError as error:  # the actor, its process or its node has died
        raise Lost([name], f"died ({what}): {str(error).splitlines()[0]}") from error


def _dead(waiting: list[Any], named: dict[Any, str]) -> list[str]:
    """Return the actors that died, waiting up to the grace time for reports."""
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
    """Check which actors are alive. A busy actor counts as alive.

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
    """Kill actors that this run started, dead or alive."""
    for actor in actors:
        ray.kill(actor, no_restart=True)


class Restarts:
    """Limits how often the actors of a kind are replaced without progress before the run gives up.

    Rare faults never end a run, however long. A fault that recurs at the same step does.

    Args:
        kind: kind of actor, for messages.
        most: maximum number of replacements.
        say: prints messages.
        wait: waits until the resources for a replacement are available.
    """

    def __init__(self, kind: str, most: int, say: Callable[[str], None], wait: Callable[[], None]) -> None:
        self.kind, self.most, self.say, self.wait = kind, most, say, wait
        self.count = self.furthest = 0

    def finished(self, step: int) -> None:
        """Report a finished step. The count restarts at 0, unless the step only repeats one after a restart."""
        if step > self.furthest:
            self.furthest, self.count = step, 0

    def another(self, error: Lost) -> None:
        """Count one replacement.

        Raises:
            UserError: the maximum is exceeded.
        """
        self.count += 1
        if self.count > self.most:
            raise UserError(
                f"{self.kind}: {error}. Replaced {self.most} times already without a new step between "
                "(minimind.max_restarts): giving up; saved checkpoints are complete, and the same command resumes"
            ) from error
        self.say(f"{self.kind}: {error}; replacing it ({self.count} of {self.most})")
        self.wait()


class ActorPool:
    """Actors that share work. An actor that dies is replaced, and its part of the work is done again.

    Args:
        kind: kind of actor, for messages.
        start: creates the i-th actor.
        count: number of actors.
        timeout: deadline of a call in seconds.
        restarts: see `Restarts`.
    """

    def __init__(self, kind: str, start: Callable[[int], Any], count: int, timeout: float, restarts: Restarts) -> None:
        self.kind, self.start, self.timeout, self.restarts = kind, start, timeout, restarts
        self.actors = [start(i) for i in range(count)]

    def __len__(self) -> int:
        return len(self.actors)

    def submit(self, method: str, parts: Sequence[tuple[Any, ...]]) -> PoolCall:
        """Call a method once per part. Part i goes to actor i (modulo the number of actors)."""
        return PoolCall(self, method, list(parts))

    def run(self, method: str, parts: Sequence[tuple[Any, ...]]) -> list[Any]:
        """Call a method once per part, and return the results."""
        return self.submit(method, parts).result()

    def everywhere(self, method: str, *arguments: Any) -> list[Any]:
        """Call a method with the same arguments on every actor."""
        return self.run(method, [arguments] * len(self.actors))

    def name(self, number: int) -> str:
        """Return the name of an actor, for messages."""
        return f"{self.kind} {number}"

    def replace(self, number: int) -> None:
        """Kill an actor, if it is still alive, and start another in its place."""
        stop([self.actors[number]])
        self.actors[number] = self.start(number)

    def close(self) -> None:
        """Kill all actors."""
        stop(self.actors)


class PoolCall:
    """A call to the actors of a pool that is in progress."""

    def __init__(self, pool: ActorPool, method: str, parts: list[tuple[Any, ...]]) -> None:
        self.pool, self.method, self.parts = pool, method, parts
        self.started = time.monotonic()
        self.refs = [self._call(i) for i in range(len(parts))]

    def _call(self, part: int) -> Any:
        actor = self.pool.actors[part % len(self.pool)]
        return getattr(actor, self.method).remote(*self.parts[part])

    def result(self) -> list[Any]:
        """Return the results, part by part. Parts of actors that died are done again.

        Raises:
            UserError: an actor raised it, or actors died too often.
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
                self.pool.replace(owner)  # waits for resources if a host was lost
                self.pool.restarts.another(loss)
            for part in missing:
                self.refs[part] = self._call(part)
        return found


class WorkersLost(Exception):
    """Every worker of a kind is lost, or the work is no longer wanted."""


class Workers:
    """Actors that take parts of the work as they become free. A part of an actor that dies is given to another.

    It does not start actors: whoever does replaces those in `lost`, and calls `use`.

    Args:
        timeout: seconds that a part may take.
    """

    def __init__(self, timeout: float) -> None:
        self.timeout = timeout
        self.actors: dict[int, Any] = {}
        self.lost: dict[int, str] = {}
        self.unwanted = threading.Event()

    def __len__(self) -> int:
        return max(1, len(self.actors) - len(self.lost))

    def use(self, actors: Mapping[int, Any]) -> None:
        """Use these actors from now on. An actor that was lost stays lost, also one that another thread loses now."""
        for number, actor in actors.items():
            if self.actors.get(number) != actor:
                self.lost.pop(number, None)
        self.actors = dict(actors)

    def run(self, method: str, parts: Sequence[tuple[Any, ...]]) -> list[Any]:
        """What a method returns for the arguments of each part.

        Raises:
            WorkersLost: no actor is left.
            UserError: as an actor raised it.
            RuntimeError: another error in an actor.
        """
        found: dict[int, Any] = {}
        todo, free = deque(range(len(parts))), deque(number for number in self.actors if number not in self.lost)
        running: dict[Any, tuple[int, int, float]] = {}
        while len(found) < len(parts):
            while todo and free:
                number, part = free.popleft(), todo.popleft()
                ref = getattr(self.actors[number], method).remote(*parts[part])
                running[ref] = number, part, time.monotonic() + self.timeout
            if not running or self.unwanted.is_set():
                raise WorkersLost(method)
            done, _ = ray.wait(list(running), num_returns=1, timeout=POLL_SECONDS, fetch_local=False)
            late = [ref for ref, (_, _, deadline) in running.items() if ref not in done and time.monotonic() > deadline]
            for ref in [*done, *late]:
                number, part, _ = running.pop(ref)
                try:
                    if ref in late:
                        raise Lost([str(number)], f"no answer within {self.timeout:g} s ({method})")
                    found[part] = _result(ref, {ref: str(number)}, [], method, time.monotonic() + self.timeout)
                    free.append(number)
                except Lost as loss:
                    self.lost[number] = str(loss).partition(": ")[2]
                    todo.appendleft(part)
        return [found[part] for part in range(len(parts))]
