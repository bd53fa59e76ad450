"""Each command of docs/tools.md names what exists."""

from __future__ import annotations

import re
from pathlib import Path

from helpers.pages import commands

from minimind_mcore.cli import COMMANDS

ROOT = Path(__file__).resolve().parents[2]


def test_the_commands_name_what_exists() -> None:
    found = commands("docs/tools.md")
    assert len(found) == 5
    for command in found:
        if script := re.search(r"bash (\S+\.sh)", command):
            assert (ROOT / script[1]).is_file(), command
        else:
            assert re.search(r"minimind_mcore\.cli (\S+)", command)[1] in COMMANDS, command  # type: ignore[index]
