"""Conversions described in files: YAML (--config), and LLaMA-Factory's dataset_info.json (--dataset-dir).

input: dataset/sft_t2t_mini.jsonl          # any flag of preprocess_data.py, without its dashes
handler_name: MiniMindInstructionHandler
tokenizer_name_or_path: tokenizer
map_keys: {messages: chats}
pack: true
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from minimind_mcore.errors import UserError
from minimind_mcore.inputs.documents import read_object, read_yaml
from minimind_mcore.preprocess.handlers import CHAT_HANDLERS
from minimind_mcore.preprocess.options import Options


def with_config(argv: Sequence[str]) -> list[str]:
    """A command line with the flags of its --config file before its own, which win.

    Raises:
        UserError: no such file, or not a mapping of flags.
    """
    words = list(argv)
    for place, word in enumerate(words):
        if word == "--config" and place + 1 < len(words):
            return [*read_config(words[place + 1]), *words[:place], *words[place + 2 :]]
        if word.startswith("--config="):
            return [*read_config(word.partition("=")[2]), *words[:place], *words[place + 1 :]]
    return words


def read_config(path: str) -> list[str]:
    """The flags in a YAML file, as words of a command line.

    Raises:
        UserError: no such file, or not a mapping of flags.
    """
    content = read_yaml(Path(path).expanduser(), f"--config {path}")
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise UserError(f"--config {path}: expected a mapping of flags, such as `input: data.jsonl`")
    words = []
    for key, value in content.items():
        flag = f"--{key.removeprefix('--').replace('_', '-')}"
        if value is True and flag != "--enable-thinking":
            words.append(flag)
        elif isinstance(value, list):
            words += [flag, *map(str, value)]
        elif value is not None and (value is not False or flag == "--enable-thinking"):
            words.append(f"{flag}={json.dumps(value) if isinstance(value, dict) else value}")
    return words


def from_dataset_info(options: Options, directory: str | None) -> Options:
    """LlamaFactoryInstructionHandler: --input names entries of `dataset_info.json` in --dataset-dir.

    Raises:
        UserError: no such file or entry, or entries that need different handlers or columns.
    """
    if directory is None:
        raise UserError("LlamaFactoryInstructionHandler: --dataset-dir is missing, where dataset_info.json is")
    folder = Path(directory).expanduser()
    path = folder / "dataset_info.json"
    known = read_object(path, "give the directory of LLaMA-Factory's dataset_info.json with --dataset-dir")
    entries: dict[str, Any] = {name.strip(): known.get(name.strip()) for name in options.input.split(",")}
    missing = [name for name, entry in entries.items() if not isinstance(entry, dict) or "file_name" not in entry]
    if missing:
        raise UserError(f"--input {missing[0]}: {path} describes no file under that name; it has {', '.join(known)}")
    kinds = [_kind(name, entry) for name, entry in entries.items()]
    if any(kind != kinds[0] for kind in kinds):
        raise UserError(f"--input {options.input}: their formats or columns differ in {path}; convert them one by one")
    handler, columns = kinds[0]
    chat = dataclasses.replace(options.chat, map_keys={**columns, **(options.chat.map_keys or {})})
    files = ",".join(str(folder / entry["file_name"]) for entry in entries.values())
    return dataclasses.replace(options, input=files, handler=handler, chat=chat)


def _kind(name: str, entry: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The handler of an entry, and its --map-keys."""
    formatting = entry.get("formatting", "alpaca")
    style = {"alpaca": "AlpacaStyle", "sharegpt": "SharegptStyle", "openai": "OpenAI"}.get(formatting)
    handler = f"{style}{'Pairwise' if entry.get('ranking') else 'Instruction'}Handler"
    if handler not in CHAT_HANDLERS:
        raise UserError(f"{name}: formatting {formatting!r} is not known here; expected alpaca, sharegpt or openai")
    columns = dict(entry.get("columns") or {})
    if entry.get("tags"):
        columns["tags"] = entry["tags"]
    return handler, columns
