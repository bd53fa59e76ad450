"""Read JSON and YAML files from untrusted sources.

The size of YAML with its aliases expanded is limited, because a small file with nested aliases can expand to more than
fits into memory.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from minimind_mcore.errors import UserError

MOST_NODES = 100_000  # nodes of a document with its aliases expanded; the largest file of this kit has 300
MOST_BYTES = 8 << 20


def read_object(file: Path, advice: str = "get the file again") -> dict[str, Any]:
    """Read the object in a JSON file.

    Args:
        file: path of the file.
        advice: what to do about a damaged file, for messages.

    Raises:
        UserError: the file cannot be read, is not JSON (not UTF-8, truncated, nested too deeply), or is not an object.
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
        content: bytes of the text.
        name: name of the text, for messages.
        advice: see `read_object`.
    """
    try:
        found = json.loads(content.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{name}: not valid JSON ({error}); {advice}") from error
    if not isinstance(found, dict):
        raise UserError(f"{name}: found a {type(found).__name__}, expected a JSON object; {advice}")
    return found


def read_yaml(path: Path, name: str | None = None) -> Any:
    """Read a YAML file.

    Args:
        path: path of the file.
        name: name of the file in messages (default: its path).

    Raises:
        UserError: the file cannot be read, is not YAML, contains itself, or is too large with its aliases expanded.
    """
    return yaml.safe_load(checked_yaml(path, name))


def checked_yaml(path: Path, name: str | None = None) -> str:
    """Return the text of a YAML file after the checks of `read_yaml`, so that hydra and OmegaConf can parse it
    safely."""
    name = name or str(path)
    try:
        if path.stat().st_size > MOST_BYTES:
            raise UserError(f"{name}: {path.stat().st_size:,} bytes, expected at most {MOST_BYTES:,} for a YAML file")
        text = path.read_text(encoding="utf-8")
        nodes = _nodes(yaml.compose(text, Loader=yaml.SafeLoader), {})
        if nodes > MOST_NODES:
            raise UserError(
                f"{name}: {nodes:,} values with its aliases (*name) written out, expected at most {MOST_NODES:,}; "
                "write the values themselves"
            )
        yaml.safe_load(text)  # raises for impossible dates and numbers
    except (yaml.YAMLError, ValueError, OverflowError, AttributeError, TypeError) as error:
        raise UserError(f"{name}: not valid YAML ({error})") from error
    except OSError as error:
        raise UserError(f"{name}: cannot be read ({error.strerror or error})") from error
    except RecursionError as error:
        raise UserError(f"{name}: nested too deeply for a configuration") from error
    return text


def _nodes(node: yaml.Node | None, known: dict[int, int | None]) -> int:
    """Count the nodes with aliases expanded. `known` has the counts of finished nodes, and None for open ones."""
    if node is None:
        return 0
    if (found := known.get(id(node), 0)) is None:
        raise ValueError("an alias is inside of the node that it refers to")
    if found:
        return found
    known[id(node)] = None
    parts: list[yaml.Node] = []
    if isinstance(node, yaml.MappingNode):
        parts = [part for pair in node.value for part in pair]
    elif isinstance(node, yaml.SequenceNode):
        parts = node.value
    count = 1 + sum(_nodes(part, known) for part in parts)
    known[id(node)] = count
    return count


def composed_files(directory: Path, name: str) -> dict[Path, Any]:
    """Return the contents of a hydra file and of all files below `directory` that defaults lists name.

    Raises:
        UserError: see `checked_yaml`.
    """
    waiting, found = [directory / f"{name}.yaml"], dict[Path, Any]()
    while waiting:
        file = waiting.pop()
        if file in found or not file.is_file():
            continue
        content = found[file] = read_yaml(file)
        listed = content.get("defaults") if isinstance(content, Mapping) else None
        for entry in listed if isinstance(listed, list) else ():
            waiting += [folder / f"{part}.yaml" for part in _named(entry) for folder in (file.parent, directory)]
    return found


def _named(entry: object) -> Iterator[str]:
    """Yield the files that an entry of a defaults list names, without suffix."""
    if isinstance(entry, str) and entry != "_self_":
        yield entry.partition("@")[0].strip("/")
    for group, names in entry.items() if isinstance(entry, Mapping) else ():
        group = str(group).partition("@")[0].split(" ")[-1].strip("/")
        yield from (f"{group}/{part}" for part in (names if isinstance(names, list) else [names]))
