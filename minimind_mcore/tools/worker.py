"""Run one tool in a process of its own: `python -m minimind_mcore.tools.worker`, started by `process.run`.

Standard input holds {"function": "module:name", "arguments": {...}, "memory": bytes, "seconds": s, "file_size": bytes,
"result": file descriptor}. The result is written to that descriptor as {"result": ...} or {"error": "..."}. What the
tool prints goes to standard output. The limits are set before the tool's module is imported. The tool runs in a child,
and the worker ends with the child's status. Before that it kills all processes that the tool has started, in whatever
session they are.
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

SUBREAPER = 36  # PR_SET_CHILD_SUBREAPER of Linux's prctl: processes whose parent ends become children of this one


def main() -> None:
    """Run the tool that standard input names."""
    job = json.load(sys.stdin)
    seconds = math.ceil(job["seconds"]) + 1  # the parent's clock ends the tool; this limit holds if the parent dies
    for kind, limit in (
        (resource.RLIMIT_AS, job["memory"]),
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_FSIZE, job["file_size"]),
        (resource.RLIMIT_CORE, 0),
    ):
        hard = resource.getrlimit(kind)[1]
        limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        resource.setrlimit(kind, (limit, limit))
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # Python ignores it; without it endless output would only raise
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    with contextlib.suppress(AttributeError):  # elsewhere only direct children are found
        ctypes.CDLL(None).prctl(SUBREAPER, 1, 0, 0, 0)
    tool = os.fork()
    if tool == 0:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        _run(job)
    try:
        status = os.waitstatus_to_exitcode(os.waitpid(tool, 0)[1])
    finally:
        _kill_children()
    if status < 0:
        os.kill(os.getpid(), -status)
    sys.exit(status)


def _run(job: dict[str, Any]) -> NoReturn:
    """Run the tool, write its result and end this process."""
    own = os.getpid()
    try:
        module, _, name = job["function"].partition(":")
        found = {"result": getattr(importlib.import_module(module), name)(**job["arguments"])}
        text = json.dumps(found, ensure_ascii=False)
    except MemoryError:
        text = json.dumps({"error": f"the tool needs more than {job['memory'] / 2**20:,.0f} MiB of memory"})
    except BaseException as error:  # whatever the tool raises, SystemExit too, is its result
        text = json.dumps({"error": f"{type(error).__name__}: {error}"}, ensure_ascii=False)
    if os.getpid() == own:  # else the tool has forked, and this is its child
        sys.stdout.flush()
        with os.fdopen(job["result"], "w", encoding="utf-8", errors="replace") as file:
            file.write(text)
    os._exit(0)


def _kill_children() -> None:
    """Kill the children of this process, then those that become its children by that, until there are none."""
    while children := psutil.Process().children():
        for child in children:
            with contextlib.suppress(psutil.Error):
                child.kill()
                child.wait()


if __name__ == "__main__":
    main()
