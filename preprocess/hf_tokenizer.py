"""Load tokenizer.json with transformers, and export tokenizers that AutoTokenizer loads with the same ids.

AutoTokenizer chooses a class by `tokenizer_class` and by the model type in config.json. Some classes build another
tokenizer from the vocabulary: Qwen2Tokenizer, which transformers 5 uses for every Qwen3 model, splits digits and
normalizes text. Training reads tokenizer.json. Therefore `load_tokenizer` also wraps tokenizer.json, and exports get a
tokenizer_config.json that makes AutoTokenizer do the same.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import tokenizers

from minimind_mcore.errors import UserError
from minimind_mcore.preprocess.tokenize import identity, load_backend
from minimind_mcore.preprocess.tokenizer_files import (
    CONFIG,
    SPECIAL_TOKENS,
    chat_template,
    read_json,
    read_optional,
    special_tokens,
    text_of,
    tokenizer_json,
)

# Keys that choose another class or file, or change how texts are encoded.
_OVERRIDES = (
    *("auto_map", "backend", "from_slow", "init_inputs", "is_local", "local_files_only", "name_or_path"),
    *("tokenizer_file", "vocab_file", "merges_file", "special_tokens_map_file", "split_special_tokens"),
)


def load_tokenizer(path: str | os.PathLike[str]) -> Any:
    """Return transformers' PreTrainedTokenizerFast for a tokenizer.json, with the directory's chat template.

    Args:
        path: tokenizer directory or `tokenizer.json`.

    Raises:
            UserError: the tokenizer is not usable, or transformers would encode texts differently.
    """
    from transformers import PreTrainedTokenizerFast

    file = tokenizer_json(path)
    config = read_optional(file.with_name(CONFIG))
    options = {"model_max_length": config["model_max_length"]} if config.get("model_max_length") else {}
    backend = load_backend(file)
    tokenizer: Any = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        add_prefix_space=_prefix_space(read_json(file)) or False,
        clean_up_tokenization_spaces=bool(config.get("clean_up_tokenization_spaces")),
        chat_template=chat_template(file),
        **options,
    )
    for name, token in special_tokens(file).items():
        # Set later: the constructor would add a token that is not among tokenizer.json's added_tokens.
        if backend.token_to_id(token) is not None:
            setattr(tokenizer, name, token)
    require_same_ids(tokenizer, backend, file)
    return tokenizer


def require_same_ids(tokenizer: Any, backend: tokenizers.Tokenizer, file: Path) -> None:
    """Raise a `UserError` unless transformers' tokenizer encodes every text as `backend`, which is tokenizer.json."""
    found = getattr(tokenizer, "backend_tokenizer", None)
    if found is None or identity(found.to_str()) != identity(backend.to_str()):
        raise UserError(
            f"{file}: transformers loads it as {type(tokenizer).__name__} with other token ids than tokenizer.json; "
            'expected equal ones. Set "tokenizer_class": "PreTrainedTokenizerFast" in tokenizer_config.json, and save '
            "the tokenizer again with save_pretrained() if that is set"
        )


def _prefix_space(content: dict[str, Any]) -> bool | None:
    """Return whether tokenizer.json puts a space before a text. None if its pre-tokenizer has no such setting."""
    found = (content.get("pre_tokenizer") or {}).get("add_prefix_space")
    return None if found is None else bool(found)


def export_config(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return a tokenizer_config.json with which AutoTokenizer (transformers 4 and 5, vLLM) loads tokenizer.json.

    It contains special tokens and chat template of the other files. Settings that would change ids are left out:
    another class, and tokens that tokenizer.json lacks.

    Args:
        path: tokenizer directory or `tokenizer.json`.
    """
    file = tokenizer_json(path)
    content, config = read_json(file), read_optional(file.with_name(CONFIG))
    added = {token["content"]: token for token in content.get("added_tokens") or []}
    result = {key: value for key, value in config.items() if key not in (*_OVERRIDES, *SPECIAL_TOKENS)}
    # transformers 5 writes a list, but transformers 4 expects an object.
    extra = result.pop("extra_special_tokens", None)
    listed = [*(config.get("additional_special_tokens") or []), *(extra if isinstance(extra, list) else [])]
    kept = [text for text in dict.fromkeys(map(text_of, listed)) if text in added]
    if listed:
        result["additional_special_tokens"] = kept
    if isinstance(extra, dict):
        result["extra_special_tokens"] = {key: token for key, token in extra.items() if text_of(token) in added}
    # transformers 5 treats every text under a key like image_token as a special token.
    for key in [key for key, value in result.items() if key.endswith("_token") and text_of(value) is not None]:
        if text_of(result[key]) not in added:
            del result[key]
    named = special_tokens(file)
    for name in SPECIAL_TOKENS:
        if name in config or name in named:
            result[name] = named.get(name) if named.get(name) in added else None
    result["added_tokens_decoder"] = {
        str(token["id"]): {key: value for key, value in token.items() if key != "id"} for token in added.values()
    }
    result["tokenizer_class"] = "PreTrainedTokenizerFast"
    result.pop("add_prefix_space", None)
    if (space := _prefix_space(content)) is not None:
        result["add_prefix_space"] = space
    if template := chat_template(file):
        result["chat_template"] = template
    return result


def require_auto_tokenizer(folder: Path) -> None:
    """Raise a `UserError` unless AutoTokenizer loads the exported directory with the ids of its tokenizer.json."""
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    file = folder / "tokenizer.json"
    require_same_ids(loaded, load_backend(file), file)
