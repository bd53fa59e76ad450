"""Read the files of a tokenizer directory: tokenizer.json, its special tokens, its chat template.

tokenizer.json determines the ids. The other files only name special tokens and contain the chat template:

| what | read from, first match |
|---|---|
| special tokens | tokenizer_config.json and special_tokens_map.json, merged as transformers merges both |
| chat template | chat_template.jinja, tokenizer_config.json, chat_template.json |
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from minimind_mcore.errors import UserError
from minimind_mcore.inputs.documents import read_object

SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
CONFIG, SPECIAL_TOKENS_MAP = "tokenizer_config.json", "special_tokens_map.json"
TEMPLATES = ("chat_template.jinja", CONFIG, "chat_template.json")


def tokenizer_json(path: str | os.PathLike[str]) -> Path:
    """Return the `tokenizer.json` of a tokenizer directory (or the file itself).

    Raises:
        UserError: the file does not exist.
    """
    file = Path(path).expanduser()
    file = file / "tokenizer.json" if file.is_dir() else file
    if not file.is_file():
        raise UserError(
            f"tokenizer {path}: no tokenizer.json there; expected a local directory with tokenizer.json and "
            "tokenizer_config.json (download a published one first, or train one with "
            "python -m minimind_mcore.preprocess.train_tokenizer)"
        )
    return file


def read_json(file: Path) -> dict[str, Any]:
    """Read the JSON object in a tokenizer's file.

    Raises:
        UserError: the file has another content.
    """
    return read_object(file, "the tokenizer is damaged")


def read_optional(file: Path) -> dict[str, Any]:
    """Read the JSON object in a file. Empty if the file does not exist."""
    return read_json(file) if file.is_file() else {}


def text_of(token: Any) -> str | None:
    """Return the text of a special token, which is a string or an object with `content`."""
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) else None


def special_tokens(path: str | os.PathLike[str]) -> dict[str, str]:
    """Return the special tokens of a tokenizer directory, {"bos_token": "<s>", ...}, without null values.

    transformers ignores special_tokens_map.json if tokenizer_config.json has `added_tokens_decoder`, and otherwise
    prefers it. Here it also supplies tokens that such a tokenizer_config.json does not mention.

    Args:
        path: tokenizer directory or `tokenizer.json`.
    """
    folder = tokenizer_json(path).parent
    config, others = read_optional(folder / CONFIG), read_optional(folder / SPECIAL_TOKENS_MAP)
    merged = {**others, **config} if "added_tokens_decoder" in config else {**config, **others}
    found = {name: text_of(merged.get(name)) for name in SPECIAL_TOKENS}
    return {name: text for name, text in found.items() if text is not None}


def chat_template(path: str | os.PathLike[str]) -> str | list[dict[str, str]] | None:
    """Return the Jinja source of a tokenizer's chat template, a list of named templates, or None.

    Args:
        path: tokenizer directory or `tokenizer.json`.
    """
    folder = tokenizer_json(path).parent
    for name in TEMPLATES:
        file = folder / name
        if name.endswith(".jinja"):
            found: Any = file.read_text(encoding="utf-8") if file.is_file() else None
        else:
            found = read_optional(file).get("chat_template")
        if isinstance(found, dict):  # {name: source}, another form of the list
            found = [{"name": key, "template": source} for key, source in found.items()]
        if isinstance(found, (str, list)) and found:
            return found
    return None


def template_source(tokenizer: str | os.PathLike[str]) -> str:
    """Return the chat template of a tokenizer directory as text.

    Raises:
        UserError: the tokenizer has no chat template.
    """
    found = chat_template(tokenizer)
    if not found:
        raise UserError(
            f"tokenizer {tokenizer}: no chat template in {' or '.join(TEMPLATES)}, which "
            "conversations need; take MiniMind's tokenizer, or choose a template with --prompt-type"
        )
    return found if isinstance(found, str) else json.dumps(found, sort_keys=True)
