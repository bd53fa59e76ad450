"""Damaged inputs for the fuzz in tests/faults, and how they are judged.

A `Case` writes one damaged input and gives it to its reader. Every case must be refused: its damage changes what the
input says, and the reader can know it.
"""

from __future__ import annotations

import contextlib
import io
import json
import random
import signal
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minimind_mcore.errors import UserError

SECONDS = 20  # the deadline of one input
REFUSED, ACCEPTED, TRACEBACK, HANG, UNNAMED = "refused", "accepted", "traceback", "hang", "unnamed"


@dataclass(frozen=True)
class Case:
    """A damaged input.

    Attributes:
        kind: what is damaged: flags, config.json, ....
        name: what is damaged, and how.
        read: gives the input to its reader; returns problems, where the reader reports them so.
        named: what the refusal must mention: a flag, or a part of the file's path.
    """

    kind: str
    name: str
    read: Callable[[], list[str] | None]
    named: str


@dataclass(frozen=True)
class Outcome:
    """What became of a case."""

    case: Case
    verdict: str
    message: str

    def __str__(self) -> str:
        return f"{self.case.kind}: {self.case.name}: {self.verdict}: {self.message[-700:]}"


class Late(BaseException):
    """The deadline has passed; no reader catches it."""


def judge(case: Case) -> Outcome:
    """Run a case within the deadline."""

    def late(*_: object) -> None:
        raise Late

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as errors:
            problems = case.read()
        if not problems:
            return Outcome(case, ACCEPTED, "")
        message = "; ".join(problems)
    except UserError as error:
        message = str(error)
    except SystemExit as error:
        message = errors.getvalue() if error.code else ""
    except Late:
        return Outcome(case, HANG, f"no answer after {SECONDS} s")
    except BaseException:  # what a user would see as a traceback
        return Outcome(case, TRACEBACK, traceback.format_exc())
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    sentence = case.named in message and len(message.split()) >= 3 and "Traceback" not in message
    return Outcome(case, REFUSED if sentence else UNNAMED, message)


# ---------------------------------------------------------------------------------------------------- JSON files

NOT_JSON = {
    "empty": b"",
    "cut": b'{"a": [1, 2',
    "not UTF-8": b'{"a": "\xff\xfe"}',
    "a list": b"[1, 2]",
    "a number": b"3",
    "null": b"null",
    "deep": b"[" * 200_000,
    "deep object": b'{"a":' * 100_000,
    "a huge number": b'{"a": 1' + b"0" * 10_000 + b"}",
    "NUL bytes": b"\0" * 64,
    "a byte-order mark of UTF-16": "{}".encode("utf-16"),
}
WRONG: list[Any] = ["x", [], {}, True, -1, float("nan"), 1e400, 10**30, [1, 2], {"a": 1}, -0.5]


def write(file: Path, content: Any) -> None:
    text = content if isinstance(content, bytes) else json.dumps(content).encode()
    file.write_bytes(text)


def flipped(data: bytes, at: int, rng: random.Random) -> bytes:
    return data[:at] + bytes([data[at] ^ (1 << rng.randrange(8))]) + data[at + 1 :]
