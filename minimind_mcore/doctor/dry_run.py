"""Check one script: its dry run looks at data, tokenizer, checkpoints and the places that are written."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path

from minimind_mcore.doctor.finding import Finding, fail, ok
from minimind_mcore.doctor.installed import Host
from minimind_mcore.errors import UserError


def require(script: str) -> None:
    """That there is such a script.

    Raises:
        UserError: there is none.
    """
    if not Path(script).is_file():
        raise UserError(
            f"{script}: no such script; expected one such as examples/mcore/minimind/pretrain_minimind_ptd.sh"
        )


def check(host: Host, script: str, arguments: Sequence[str]) -> list[Finding]:
    """Run a script with `--dry-run` in this environment, and pass on its error."""
    done = subprocess.run(
        ["bash", script, *arguments, *([] if "--dry-run" in arguments else ["--dry-run"])],
        env=dict(host.environ),
        capture_output=True,
        text=True,
    )
    name = Path(script).name
    if done.returncode != 0:
        said = [line for line in done.stderr.splitlines() if line.strip()]
        start = next((n for n, line in enumerate(said) if line.startswith("error:")), max(0, len(said) - 3))
        return [fail(name, "\n".join(said[start:]).removeprefix("error: ") or f"exit status {done.returncode}")]
    forecast = [line for line in done.stdout.splitlines() if line.startswith(("memory:", "time:"))]
    return [ok(name, "\n".join(["its dry run finds nothing wrong", *forecast]))]
