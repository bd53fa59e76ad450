"""How a record becomes text: the table behind --handler-name.

A handler turns a parsed record and the wanted keys into one text per key, or a `Reject`. The
instruction handlers of MindSpeed-LLM, which also build labels, have their own module.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from minimind_mcore.errors import UserError
from minimind_mcore.preprocess.readers import Reject, escape


@dataclass(frozen=True)
class Handler:
    """What a name of --handler-name does.

    Attributes:
        text: of a record's fields and one key, or why there is none.
        fields: what it reads of a record; none: the keys themselves.
    """

    text: Callable[[dict[str, Any], str], str | Reject]
    fields: tuple[str, ...] = ()

    def columns(self, keys: Sequence[str]) -> Sequence[str]:
        """The fields that must be read for these keys."""
        return self.fields or keys

    def __call__(self, record: Any, keys: Sequence[str]) -> dict[str, str] | Reject:
        """The text under each key; a record that cannot be used is rejected whole."""
        if not isinstance(record, dict):
            return _reject(f"not an object but {_kind(record)}", record)
        texts = {}
        for key in keys:
            text = self.text(record, key)
            if isinstance(text, Reject):
                return text
            try:
                text.encode("utf-8")
            except UnicodeEncodeError as error:
                return _reject(
                    f"field {key!r} has a lone surrogate or invalid UTF-8 at character {error.start + 1}", record
                )
            texts[key] = text
        return texts


def _field(record: dict[str, Any], key: str) -> str | Reject:
    """The string under a key, as it stands."""
    text = record.get(key)
    if text is None:
        return _reject(f"field {key!r} {'is null' if key in record else 'is missing'}", record)
    if not isinstance(text, str):
        return _reject(f"field {key!r} is not a string but {_kind(text)}", record)
    return text


# Vicuna's preamble around Alpaca's prompt, as MindSpeed-LLM joins them: where a record has no input, its template
# prints Python's None.
_ALPACA = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
    "USER: Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n###{input}\n\n### Response: ASSISTANT: {output}"
)


def _alpaca(record: dict[str, Any], key: str) -> str | Reject:
    """An Alpaca record (instruction, input, output) in its prompt; `key` names the dataset only."""
    for name in ("instruction", "output"):
        if isinstance(text := _field(record, name), Reject):
            return text
    if record.get("input") and isinstance(text := _field(record, "input"), Reject):
        return text
    given = f" Input:\n{record['input']}" if record.get("input") else None
    return _ALPACA.format(instruction=record["instruction"], input=given, output=record["output"])


def _sharegpt(record: dict[str, Any], key: str) -> str | Reject:
    """The turns of a conversation (`value`, or `content`), one after the other with nothing between."""
    turns = record.get(key)
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        return _reject(f"field {key!r} is not a list of turns but {_kind(turns)}", record)
    # A parquet file has both columns for every turn, one of them null.
    texts = [turn.get("content") if turn.get("value") is None else turn["value"] for turn in turns]
    for number, text in enumerate(texts, 1):
        if not isinstance(text, str):
            return _reject(f"field {key!r}: turn {number} has no string under 'value' or 'content'", record)
    return "".join(texts)


def _kind(value: Any) -> str:
    names = {
        dict: "an object",
        list: "an array",
        str: "a string",
        bool: "a boolean",
        int: "a number",
        float: "a number",
    }
    return names.get(type(value), "null" if value is None else type(value).__name__)


def _reject(reason: str, record: Any) -> Reject:
    return Reject(reason, escape(json.dumps(record, ensure_ascii=False, default=repr)))


HANDLERS: Mapping[str, Handler] = {
    "GeneralPretrainHandler": Handler(_field),
    "AlpacaPretrainHandler": Handler(_alpaca, ("instruction", "input", "output")),
    "SharegptPretrainHandler": Handler(_sharegpt),
}


def find_handler(name: str) -> Handler:
    """Look up a handler.

    Raises:
        UserError: unknown. (MindSpeed-LLM takes an unknown name for GeneralPretrainHandler, so that
            a misspelt instruction handler yields data of the wrong kind.)
    """
    if name not in HANDLERS:
        raise UserError(f"--handler-name {name}: unknown; this version knows {', '.join(HANDLERS)}")
    return HANDLERS[name]
