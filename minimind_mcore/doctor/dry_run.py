"""Check one script with its dry run, which checks data, tokenizer, checkpoints and output directories."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path

from minimind_mcore.doctor.finding import Finding, fail, ok
from minimind_mcore.doctor.installed import Host
from minimind_mcore.errors import UserError, last_error


def require(script: str) -> None:
    """Check that a script exists.

    Raises:
        UserError: the script does not exist.
    """
    if not Path(script).is_file():
        raise UserError(
            f"{script}: no such script; expected one such as examples/mcore/minimind/pretrain_minimind_ptd.sh"
        )


def check(host: Host, script: str, arguments: Sequence[str]) -> list[Finding]:
    """Run a script with `--dry-run` in this environment, and report its error."""
    done = subprocess.run(
        ["bash", script, *arguments, *([] if "--dry-run" in arguments else ["--dry-run"])],
        env=dict(host.environ),
        capture_output=True,
        text=True,
    )
    name = Path(script).name
    if done.returncode != 0:
        return [fail(name, last_error(done.stderr, done.returncode))]
    forecast = [line for line in done.stdout.splitlines() if line.startswith(("memory:", "time:"))]
    return [ok(name, "\n".join(["its dry run finds nothing wrong", *forecast]))]
