"""Run one tool in a process of its own: `python -m minimind_mcore.tools.worker`, started by `process.run`.

Standard input holds {"function": "module:name", "arguments": {...}, "memory": bytes, "seconds": s, "file_size": bytes,
"result": file descriptor}. The result is written to that descriptor as {"result": ...} or {"error": "..."}. What the
tool prints goes to standard output. The limits are set before the tool's module is imported.
"""

from __future__ import annotations

import importlib
import json
import math
import os
import resource
import signal
import sys


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
    parent = os.getpid()
    try:
        module, _, name = job["function"].partition(":")
        found = {"result": getattr(importlib.import_module(module), name)(**job["arguments"])}
        text = json.dumps(found, ensure_ascii=False)
    except MemoryError:
        text = json.dumps({"error": f"the tool needs more than {job['memory'] / 2**20:,.0f} MiB of memory"})
    except BaseException as error:  # whatever the tool raises, SystemExit too, is its result
        text = json.dumps({"error": f"{type(error).__name__}: {error}"}, ensure_ascii=False)
    if os.getpid() != parent:  # the tool has forked, and this is its child
        os._exit(0)
    sys.stdout.flush()
    with os.fdopen(job["result"], "w", encoding="utf-8", errors="replace") as file:
        file.write(text)


if __name__ == "__main__":
    main()
