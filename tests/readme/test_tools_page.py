"""The commands of docs/tools.md: both languages have the same, and each names what exists."""

from __future__ import annotations

import re
from pathlib import Path

from minimind_mcore.cli import COMMANDS

ROOT = Path(__file__).resolve().parents[2]


def commands(page: str) -> list[str]:
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.S)
    return [line for block in blocks for line in block.splitlines()]


def test_the_commands_name_what_exists() -> None:
    found = commands("docs/tools.md")
    assert found == commands("docs/tools_zh.md") and len(found) == 5
    for command in found:
        if script := re.search(r"bash (\S+\.sh)", command):
            assert (ROOT / script[1]).is_file(), command
        else:
            assert re.search(r"minimind_mcore\.cli (\S+)", command)[1] in COMMANDS, command  # type: ignore[index]
