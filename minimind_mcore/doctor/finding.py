"""The result of a check."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    """The result of one check.

    Attributes:
        level: "ok"; "warn": the job may fail or be slower; "fail": the job would fail.
        subject: the checked thing, in a word or two.
        text: what was found, and what was expected.
        fix: the command that fixes the problem, or what to do.
    """

    level: str
    subject: str
    text: str
    fix: str = ""


def ok(subject: str, text: str) -> Finding:
    """Return a finding without a problem."""
    return Finding("ok", subject, text)


def warn(subject: str, text: str, fix: str = "") -> Finding:
    """Return a finding about a job that may fail."""
    return Finding("warn", subject, text, fix)


def fail(subject: str, text: str, fix: str = "") -> Finding:
    """Return a finding about a job that would fail."""
    return Finding("fail", subject, text, fix)
