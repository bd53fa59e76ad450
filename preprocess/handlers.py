"""How a record becomes text: the table behind --handler-name.

A handler is a function of the parsed record and the wanted keys that returns one text per key, or a
`Reject`. The instruction handlers of MindSpeed-LLM, which also build labels, have their own module.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from minimind_mcore.errors import UserError
from minimind_mcore.preprocess.readers import Reject, escape

Handler = Callable[[Any, Sequence[str]], "dict[str, str] | Reject"]


def general_pretrain(record: Any, keys: Sequence[str]) -> dict[str, str] | Reject:
    """The text under each key, as it stands."""
    if not isinstance(record, dict):
        return _reject(f"not an object but {_kind(record)}", record)
    texts = {}
    for key in keys:
        text = record.get(key)
        if text is None:
            state = "is null" if key in record else "is missing"
            return _reject(f"field {key!r} {state}", record)
        if not isinstance(text, str):
            return _reject(f"field {key!r} is not a string but {_kind(text)}", record)
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            return _reject(
                f"field {key!r} has a lone surrogate or invalid UTF-8 at character {error.start + 1}", record
            )
        texts[key] = text
    return texts


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


HANDLERS: Mapping[str, Handler] = {"GeneralPretrainHandler": general_pretrain}


def find_handler(name: str) -> Handler:
    """Look up a handler.

    Raises:
        UserError: unknown. (MindSpeed-LLM takes an unknown name for GeneralPretrainHandler, so that
            a misspelt instruction handler yields data of the wrong kind.)
    """
    if name not in HANDLERS:
        raise UserError(f"--handler-name {name}: unknown; this version knows {', '.join(HANDLERS)}")
    return HANDLERS[name]
