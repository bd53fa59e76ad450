"""Run a Python function in a subprocess with limits on time, memory, processes and output.

When the call ends, the subprocess and all its children are killed.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass

GRACE = 10.0  # seconds for the worker to kill a tool's children


@dataclass(frozen=True)
class Limits:
    """Limits of one call.

    Attributes:
        seconds: time until the tool is killed.
        memory: bytes of address space of each process.
        processes: maximum number of processes at the same time.
        output: maximum bytes of the result, of the tool's output, and of any file that the tool writes.
    """

    seconds: float = 10.0
    memory: int = 1 << 29
    processes: int = 64
    output: int = 1 << 20


@dataclass(frozen=True)
class Result:
    """The result of a call.

    Attributes:
        text: JSON for the model: the function's result, or {"error": ...}.
        ok: the function returned without an error.
        printed: start of the tool's output.
    """

    text: str
    ok: bool = True
    printed: str = ""


def failed(reason: str, printed: str = "") -> Result:
    """Return the result of a call that failed."""
    return Result(json.dumps({"error": reason}, ensure_ascii=False), False, printed)


def run(function: str, arguments: Mapping[str, object], limits: Limits, environ: Mapping[str, str]) -> Result:
    """Run a function in a subprocess.

    Args:
        function: "module:name". Only the subprocess imports the module.
        arguments: keyword arguments of the function.
        limits: limits of time, memory, processes and output.
        environ: additional environment variables.

    Returns:
        The result of the function, or the reason of the failure.
    """
    paths = {"PYTHONDONTWRITEBYTECODE": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    # Files, not pipes: a tool that prints without end, or whose children keep a pipe open, cannot block the caller.
    with tempfile.TemporaryFile() as job, tempfile.TemporaryFile() as result, tempfile.TemporaryFile() as printed:
        content = {"function": function, "arguments": arguments, "memory": limits.memory, "seconds": limits.seconds}
        content |= {"file_size": limits.output, "processes": limits.processes, "result": result.fileno()}
        job.write(json.dumps(content).encode())
        job.seek(0)
        process = subprocess.Popen(
            [sys.executable, "-m", "minimind_mcore.tools.worker"],
            stdin=job,
            stdout=printed,
            stderr=subprocess.STDOUT,
            pass_fds=[result.fileno()],
            env={**os.environ, **environ, **paths},
            start_new_session=True,
        )
        try:
            status: int | None = process.wait(limits.seconds)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            _end(process)
        printed.seek(0)
        shown = printed.read(limits.output).decode(errors="replace")
        result.seek(0)
        return _result(status, result.read().decode(errors="replace"), shown, limits)


def _result(status: int | None, written: str, printed: str, limits: Limits) -> Result:
    if status is None:
        return failed(f"the tool ran for more than {limits.seconds:g} s and was ended", printed)
    if status == -signal.SIGXFSZ or (status == 0 and len(written) > limits.output):
        return failed(f"the tool printed or returned more than {limits.output:,} bytes", printed)
    if status or not written:
        lines = printed.strip().splitlines()
        return failed(f"the tool's process ended with status {status}" + (f": {lines[-1]}" if lines else ""), printed)
    found = json.loads(written)
    if "error" in found:
        return failed(found["error"], printed)
    return Result(json.dumps(found["result"], ensure_ascii=False), True, printed)


def _end(process: subprocess.Popen[bytes]) -> None:
    """End the worker, which kills the tool and all its children first."""
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(GRACE)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
