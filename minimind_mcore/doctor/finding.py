"""What a check says."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    """The result of one check.

    Attributes:
        level: "ok"; "warn": it may go wrong, or goes slower; "fail": the job would fail.
        subject: what was checked, in a word or two.
        text: what was found, and what was expected.
        fix: the command that puts it right, or what to do.
    """

    level: str
    subject: str
    text: str
    fix: str = ""


def ok(subject: str, text: str) -> Finding:
    """All is well."""
    return Finding("ok", subject, text)


def warn(subject: str, text: str, fix: str = "") -> Finding:
    """It may go wrong."""
    return Finding("warn", subject, text, fix)


def fail(subject: str, text: str, fix: str = "") -> Finding:
    """The job would fail."""
    return Finding("fail", subject, text, fix)
