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
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{file} does not exist, expected a JSON object; {advice}") from None
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror or error}); {advice}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file}: not valid JSON ({error}); {advice}") from error
    if not isinstance(content, dict):
        raise UserError(f"{file}: found a {type(content).__name__}, expected a JSON object; {advice}")
    return content
