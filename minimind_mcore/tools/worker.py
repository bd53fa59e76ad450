"""Run one tool in a process of its own: `python -m minimind_mcore.tools.worker`, started by `process.run`.

Standard input holds {"function": "module:name", "arguments": {...}, "memory": bytes, "seconds": s, "file_size": bytes,
"processes": number, "result": file descriptor}. The result is written to that descriptor as {"result": ...} or
{"error": "..."}. What the tool prints goes to standard output. The limits are set before the tool's module is imported.
The tool runs in a child, and the worker ends with the child's status. Before that it kills all processes that the tool
has started, in whatever session they are.

The worker counts the tool's processes itself. RLIMIT_NPROC would be wrong for that: it counts all processes and threads
of the user on the host, so the tools would fail because of the user's trainings, and root is exempt from it. The
pids.max of a cgroup would be right, but inside a container cgroups are usually read-only.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import json
import math
import os
import resource
import signal
import sys
from typing import Any, NoReturn

import psutil

# Options of Linux's prctl.
DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG: the signal that this process gets when its parent ends
SUBREAPER = 36  # PR_SET_CHILD_SUBREAPER: processes whose parent ends become children of this one
INTERVAL = 0.05  # seconds between two counts of the processes


def main() -> None:
    """Run the tool that standard input names."""
    job = json.load(sys.stdin)
    seconds = math.ceil(job["seconds"]) + 1  # `process.run` ends the tool earlier; this limit works if the caller dies
    for kind, limit in (
        (resource.RLIMIT_AS, job["memory"]),
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_FSIZE, job["file_size"]),
        (resource.RLIMIT_CORE, 0),
    ):
        hard = resource.getrlimit(kind)[1]
        limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        resource.setrlimit(kind, (limit, limit))
    # Python ignores SIGXFSZ by default. A tool could then catch the OSError of a full file and continue.
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    _prctl(SUBREAPER, 1)  # without subreaper (not Linux), orphaned grandchildren are not found
    tool = os.fork()
    if tool == 0:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        _prctl(DEATH_SIGNAL, signal.SIGKILL)
        os.setpgid(0, 0)
        _run(job)
    try:
        status = _wait(tool, job["processes"])
    finally:
        _kill_children()
    if status is None:
        _write(job, {"error": f"the tool started more than {job['processes']} processes and was ended"})
        return
    if status < 0:
        os.kill(os.getpid(), -status)
    sys.exit(status)


def _prctl(option: int, value: int) -> None:
    with contextlib.suppress(AttributeError):
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


def _wait(tool: int, most: int) -> int | None:
    """Return the exit status of the tool, or None if it runs with more than `most` processes."""
    while True:
        try:
            return int(psutil.Process(tool).wait(INTERVAL) or 0)
        except psutil.TimeoutExpired:
            children = psutil.Process().children(recursive=True)
            if len(children) > most and sum(map(_is_running, children)) > most:
                return None


def _is_running(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.Error):
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    return False


def _run(job: dict[str, Any]) -> NoReturn:
    """Run the tool, write its result and end this process."""
    own = os.getpid()
    try:
        module, _, name = job["function"].partition(":")
        found = {"result": getattr(importlib.import_module(module), name)(**job["arguments"])}
        json.dumps(found)
        try:
            json.dumps(found, allow_nan=False)
        except ValueError:
            found = {"error": "the tool returned NaN or an infinite number, which is not JSON"}
    except MemoryError:
        found = {"error": f"the tool needs more than {job['memory'] / 2**20:,.0f} MiB of memory"}
    except BaseException as error:  # whatever the tool raises, SystemExit too, is its result
        found = {"error": f"{type(error).__name__}: {error}"}
    if os.getpid() == own:  # else the tool has forked, and this is its child
        sys.stdout.flush()
        _write(job, found)
    os._exit(0)


def _write(job: dict[str, Any], found: dict[str, Any]) -> None:
    with os.fdopen(job["result"], "w", encoding="utf-8", errors="replace") as file:
        file.seek(0)
        file.truncate()  # a tool that is ended may have written its result
        file.write(json.dumps(found, ensure_ascii=False))


def _kill_children() -> None:
    """Kill the children of this process until there are none.

    The children of a killed child become children of this process, which the next pass kills.

    A signal to a process group also reaches processes that are just being forked, so a fork bomb cannot escape.
    """
    own = os.getpgrp()
    while children := psutil.Process().children():
        for child in children:
            with contextlib.suppress(psutil.Error, OSError):
                if (group := os.getpgid(child.pid)) != own:
                    os.killpg(group, signal.SIGKILL)
                child.kill()
                child.wait()


if __name__ == "__main__":
    main()
