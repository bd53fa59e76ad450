"""Read JSON files that anybody may have made."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from minimind_mcore.errors import UserError


def read_object(file: Path, advice: str = "get the file again") -> dict[str, Any]:
    """The object that a JSON file holds.

    Args:
        file: to read.
        advice: what to do about a damaged file, for messages.

    Raises:
        UserError: the file cannot be read, is no JSON (not UTF-8, cut, nested too deep), or holds something else.
    """
    try:
        content = file.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{file} does not exist, expected a JSON object; {advice}") from None
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror or error}); {advice}") from error
    return parse_object(content, str(file), advice)


def parse_object(content: bytes, name: str, advice: str) -> dict[str, Any]:
    """Return the object of a JSON text; see `read_object`.

    Args:
        content: of the text.
        name: of the text, for messages.
        advice: as `read_object`.
    """
    try:
        found = json.loads(content.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{name}: not valid JSON ({error}); {advice}") from error
    if not isinstance(found, dict):
        raise UserError(f"{name}: found a {type(found).__name__}, expected a JSON object; {advice}")
    return found
