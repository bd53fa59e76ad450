"""Read messages of all formats to one common form.

    {"role": "system" | "user" | "assistant" | "tool", "content": str,
     "reasoning_content": str, "tool_calls": [{"name": ..., "arguments": ...}], "loss": False}

The last three keys may be absent. `loss` is only present with the value False: the message has no loss.

| key of a message | read as |
|---|---|
| content | text, or OpenAI's list of parts of type text, whose texts are joined |
| reasoning_content, reasoning, thinking | `reasoning_content` of the assistant |
| tool_calls, function_call | `tool_calls` of the assistant; lists may be JSON text, as in MiniMind's files |
| loss (ms-swift), weight (OpenAI: 0 or 1) | whether the assistant's message has a loss |
| tools, functions (the Ascend fork) | definitions of the tools, on the system message |

Role `developer` is read as system, and role `function` as tool. All rules about messages are in this module, so that
preprocessing, `--prompt-file` and data for reinforcement learning read conversations in the same way.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from minimind_mcore.paths import package_json
from minimind_mcore.preprocess.readers import kind_of

logger = logging.getLogger(__name__)

Message = dict[str, Any]
Columns = Mapping[str, str]

ROLES = ("system", "user", "assistant", "tool")
ALIASES = {"developer": "system", "function": "tool"}
REASONING = ("reasoning_content", "reasoning", "thinking")
LOSS = ("loss", "weight")
TOOLS = ("tools", "functions")
PROMPTS: Mapping[str, str] = package_json("preprocess/prompts.json")
CALLS = ("tool_calls", "function_call")
SHOWN_FIELDS = 8
TEXT_PARTS = ("text", "input_text", "output_text")
# Allowed roles after each role. The empty name is the start of a conversation.
NEXT: Mapping[str, tuple[str, ...]] = {
    "": ("system", "user"),
    "system": ("user",),
    "user": ("assistant",),
    "assistant": ("user", "tool"),
    "tool": ("tool", "assistant"),
}


class Unusable(Exception):
    """A record cannot be used. The message is the reason, in a few words."""


@dataclass(frozen=True)
class Conversation:
    """A conversation in the common form.

    Attributes:
        messages: in the order of `NEXT`.
        tools: definitions of the available tools, in OpenAI's form.
        unused: unread keys of the messages, one entry per message that has such a key.
    """

    messages: Sequence[Message]
    tools: list[Any] | None = None
    unused: tuple[str, ...] = ()

    @property
    def learned(self) -> list[bool]:
        """Return for each message of the assistant whether it has a loss."""
        return [message.get("loss", True) for message in self.messages if message["role"] == "assistant"]


# ------------------------------------------------------------------------------------------------ fields of a record


def text_of(record: Mapping[str, Any], field: str) -> str:
    """Return the string in a field.

    Raises:
        Unusable: the field has no string.
    """
    value = record.get(field)
    if value is None:
        raise Unusable(f"field {field!r} is {'null' if field in record else f'missing; {_fields(record)}'}")
    if not isinstance(value, str):
        raise Unusable(f"field {field!r} is not a string but {kind_of(value)}")
    return value


def _fields(record: Mapping[str, Any]) -> str:
    # Of a parquet file only the wanted columns are read.
    return f"fields read: {', '.join(map(repr, [*record][:SHOWN_FIELDS])) or 'none'}"


def optional(record: Mapping[str, Any], field: str) -> str:
    """Return the string in a field. The field may be absent, null or unnamed."""
    return text_of(record, field) if field and record.get(field) is not None else ""


def list_of(record: Mapping[str, Any], field: str) -> list[dict[str, Any]]:
    """Return the non-empty list of objects in a field."""
    value = record.get(field)
    if field not in record:
        raise Unusable(f"field {field!r} is missing, which holds the messages; {_fields(record)}")
    if not isinstance(value, list):
        raise Unusable(f"field {field!r} is not a list of messages but {kind_of(value)}")
    if not value or not all(isinstance(item, dict) for item in value):
        raise Unusable(f"field {field!r} is {'a list of other things than messages' if value else 'empty'}")
    return value


def json_list(value: Any, name: str) -> list[Any]:
    """Return a list, also from JSON text as in MiniMind's files. A single object counts as a list of one."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise Unusable(f"{name} is not valid JSON: {error}") from error
    value = [value] if isinstance(value, dict) else value
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise Unusable(f"{name} is not a list of objects but {kind_of(value)}")
    return value


def tools_of(record: Mapping[str, Any], field: str) -> list[Any] | None:
    """Return the tools in a field. The field may be absent, empty or unnamed.

    Raises:
        Unusable: the value is neither a list of objects nor JSON text of one.
    """
    return json_list(record[field], f"field {field!r}") or None if field and record.get(field) else None


# ------------------------------------------------------------------------------------------------ keys of a message


def calls_of(value: Any, name: str) -> list[Any]:
    """Return tool calls from a list or JSON text, each with name and arguments."""
    calls = json_list(value, name)
    for call in calls:
        function = call.get("function") or call
        if not isinstance(function, dict) or not isinstance(function.get("name"), str) or "arguments" not in function:
            raise Unusable(f"{name}: a call needs name and arguments")
    return calls


def content_of(value: Any, where: str, key: str = "content") -> str:
    """Return the text of a message: a string, or the joined texts of OpenAI's content parts.

    Raises:
        Unusable: another value, such as an image part.
    """
    if isinstance(value, list) and value and all(isinstance(part, dict) for part in value):
        for part in value:
            if part.get("type", "text") not in TEXT_PARTS or not isinstance(part.get("text"), str):
                raise Unusable(f"{where} has a part of type {part.get('type')!r} in {key!r}; expected parts of text")
        return "".join(part["text"] for part in value)
    if not isinstance(value, str):
        raise Unusable(f"{where} has no string under {key!r} but {kind_of(value)}")
    return value


def reasoning_of(turn: Mapping[str, Any], where: str) -> str | None:
    """Return the reasoning of an answer, under one of the names of `REASONING`, or None.

    Raises:
        Unusable: the value is not a text, or two values differ.
    """
    found = {key: turn[key] for key in REASONING if turn.get(key) is not None}
    for key, value in found.items():
        if not isinstance(value, str):
            raise Unusable(f"{where}: {key!r} is not a string but {kind_of(value)}")
    texts = list(dict.fromkeys(text for text in found.values() if text))
    if len(texts) > 1:
        raise Unusable(f"{where} has different thoughts under {' and '.join(found)}; expected one")
    return texts[0] if texts else "" if found else None


def has_loss(turn: Mapping[str, Any], role: str, where: str) -> bool:
    """Return whether a message has a loss: `loss` is not false and `weight` is not 0.

    Raises:
        Unusable: another value, two values that contradict each other, or a loss on a message of another role.
    """
    given = {key: turn[key] for key in LOSS if turn.get(key) is not None}
    for key, value in given.items():
        if not isinstance(value, bool | int | float) or value not in (0, 1):
            expected = "true or false" if key == "loss" else "0 or 1"
            raise Unusable(f"{where} has {key} {value!r}; expected {expected}")
    if len({bool(value) for value in given.values()}) > 1:
        raise Unusable(f"{where} has loss {given['loss']!r} and weight {given['weight']!r}, which differ")
    if any(given.values()) and role != "assistant":
        key = next(iter(given))
        raise Unusable(
            f"{where} of role {role!r} has {key} {given[key]!r}; only the assistant's messages can be learned"
        )
    return all(given.values())


def message_of(turn: Mapping[str, Any], role: str, content: str, calls: list[Any] | None, where: str) -> Message:
    """Return a message in the common form, from parts whose names depend on the format and from the shared keys."""
    message: Message = {"role": role, "content": content}
    learned = has_loss(turn, role, where)
    if role != "assistant":
        return message
    thoughts = reasoning_of(turn, where)
    if thoughts is not None:
        message["reasoning_content"] = thoughts
    if calls:
        message["tool_calls"] = calls
    if not learned:
        message["loss"] = False
    return message


def openai_message(turn: Mapping[str, Any], number: int) -> Message:
    """Read a message with role and content. The content may be null next to tool calls.

    Raises:
        Unusable: the role is unknown, or there is no text.
    """
    where = f"message {number}"
    role, content = turn.get("role"), turn.get("content")
    role = ALIASES.get(role, role) if isinstance(role, str) else role
    if role not in ROLES:
        raise Unusable(f"{where} has the role {role!r}; expected {', '.join(ROLES)}")
    given = next((key for key in CALLS if turn.get(key)), None) if role == "assistant" else None
    calls = calls_of(turn[given], f"{where}: {given}") if given else None
    text = "" if content is None and calls else content_of(content, where)
    return message_of(turn, role, text, calls, where)


def unused_keys(turns: Sequence[Mapping[str, Any]], messages: Sequence[Message], field: str, form: Form) -> list[str]:
    """Return the non-empty keys of messages that are not read.

    Args:
        turns: messages in the form of the record.
        messages: the same messages in the common form.
        field: the record's field with the messages, for the name in the report.
        form: form of the turns.
    """
    found = []
    for turn, message in zip(turns, messages, strict=True):
        used = {*form.names, *LOSS}
        if message["role"] == "system":
            used.update(TOOLS)
        if message["role"] == "assistant":
            used.update(REASONING, () if form.tags else CALLS)
        found += [f"{field}[].{key}" for key, value in turn.items() if key not in used and not is_empty(value)]
    return found


def report_unused(counts: Mapping[str, int]) -> None:
    """Log the unread keys, and how often each was non-empty."""
    if counts:
        found = ", ".join(f"{key} ({count:,})" for key, count in sorted(counts.items()))
        logger.info(f"not used: keys of the input that nothing reads, and how often they occur: {found}")


def is_empty(value: Any) -> bool:
    """Return whether a field has no information."""
    return value is None or value in ("", [], {})


# ------------------------------------------------------------------------------------------------ the conversation


@dataclass(frozen=True)
class Form:
    """The form in which a format writes messages.

    Attributes:
        read: reads one message, given the turn and its number from 1.
        names: keys of a turn's role and content.
        tags: the format's word for each role. Empty: the roles themselves.
    """

    read: Callable[[Mapping[str, Any], int], Message]
    names: tuple[str, str] = ("role", "content")
    tags: Mapping[str, str] | None = None


OPENAI_FORM = Form(openai_message)


def conversation_of(
    record: Mapping[str, Any],
    columns: Columns,
    turns: Sequence[Mapping[str, Any]],
    form: Form = OPENAI_FORM,
    asked: bool = False,
) -> Conversation:
    """Return the conversation of a record.

    Args:
        record: the record. Its fields `prompt`, `system` and `tools`, by `columns`, are part of the conversation.
        columns: field of each column.
        turns: messages in the form of the record.
        form: form of the turns.
        asked: read a prompt: a last message of the assistant is dropped, and the last message must be a question.

    Raises:
        Unusable: a message cannot be read, the order of roles is wrong, or fields contradict each other.
    """
    field = columns.get("messages", "")
    messages = [form.read(turn, number) for number, turn in enumerate(turns, 1)]
    tools = _message_tools(turns, form)
    unused = unused_keys(turns, messages, field or "messages", form)
    prompt = columns.get("prompt", "")
    if prompt and not is_empty(record.get(prompt)):
        opening = _prompt_turns(record, prompt, form)
        tools = tools or _message_tools(opening, form)
        before = [form.read(turn, number) for number, turn in enumerate(opening, 1)]
        unused += unused_keys(opening, before, prompt, form)
        messages = _with_prompt(before, messages, prompt)
    messages, used = _with_system(messages, optional(record, columns.get("system", "")))
    unused += [] if used else [columns["system"]]
    tools = _same_tools(tools, tools_of(record, columns.get("tools", "")), columns.get("tools", ""))
    if asked:
        messages = _question(messages, field or "messages")
    check_order(messages, form.tags)
    if asked and messages[-1]["role"] == "system":
        raise Unusable(f"{field or 'messages'}: no message of the user")
    return Conversation(merge_calls(messages), tools, tuple(unused))


def _message_tools(turns: Sequence[Mapping[str, Any]], form: Form) -> list[Any] | None:
    """Return the tools in a system message."""
    tools = None
    for number, turn in enumerate(turns, 1):
        given = next((turn[key] for key in TOOLS if turn.get(key)), None)
        if given and form.read(turn, number)["role"] == "system":
            tools = json_list(given, "tools")
    return tools


def _prompt_turns(record: Mapping[str, Any], field: str, form: Form) -> Sequence[Mapping[str, Any]]:
    """Return the turns of a field `prompt`: a list, or the text of a question."""
    value = record[field]
    if not isinstance(value, str):
        return list_of(record, field)
    role, content = form.names
    return [{role: (form.tags or {}).get("user", "user"), content: value}]


def _with_prompt(prompt: list[Message], messages: list[Message], field: str) -> list[Message]:
    """Put the prompt before messages that start with the answer, as in TRL. Messages that start with the prompt stay.

    Raises:
        Unusable: the messages start with something else.
    """
    if messages[0]["role"] == "assistant":
        return [*prompt, *messages]
    own, given = (
        [(m["role"], m["content"].strip()) for m in part if m["role"] != "system"] for part in (messages, prompt)
    )
    if own[: len(given)] != given:
        raise Unusable(
            f"field {field!r} is not what the messages begin with, nor do they begin with the answer "
            f'(--map-keys \'{{"prompt": ""}}\' leaves the field out)'
        )
    system = [message for message in prompt[:1] if message["role"] == "system"]
    if messages[0]["role"] != "system":
        return [*system, *messages]
    if system and system[0]["content"].strip() != messages[0]["content"].strip():
        raise Unusable(f"field {field!r} has another system message than the messages; expected one of both")
    return messages


def _with_system(messages: list[Message], text: str) -> tuple[list[Message], bool]:
    """Add the record's system prompt, unless a system message has text. Return the messages, and whether it was
    added."""
    if not text:
        return messages, True
    if messages[0]["role"] != "system":
        return [{"role": "system", "content": text}, *messages], True
    if messages[0]["content"] in ("", text):
        return [{**messages[0], "content": text}, *messages[1:]], True
    return messages, False


def _same_tools(carried: list[Any] | None, given: list[Any] | None, field: str) -> list[Any] | None:
    """Return the tools of the system message or of the record's field.

    Raises:
        Unusable: both exist and differ.
    """
    if carried and given and carried != given:
        raise Unusable(f"the system message carries other tools than the field {field!r}; expected one of both")
    return carried or given


def _question(messages: list[Message], field: str) -> list[Message]:
    """Return a prompt's messages. An answer at the end is a reference or a placeholder, and is dropped."""
    if messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    if not messages:
        raise Unusable(f"{field}: no message before the assistant's")
    return [{key: value for key, value in message.items() if key != "loss"} for message in messages]


def check_order(messages: Sequence[Message], tags: Mapping[str, str] | None = None) -> None:
    """Check that questions and answers alternate.

    Several tool results may follow each other. A message of the assistant that calls tools may follow another
    message of the assistant: some datasets store parallel calls, or a text and its call, as separate turns.

    Args:
        messages: in the common form.
        tags: the format's word for each role, for the error message.

    Raises:
        Unusable: names the first message that is out of order.
    """
    previous = ""
    for number, message in enumerate(messages, 1):
        role = message["role"]
        repeated = previous == role == "assistant" and message.get("tool_calls")
        if role not in NEXT[previous] and not repeated:
            allowed = [tags.get(name, name) if tags else name for name in NEXT[previous]]
            expected = " or ".join(map(repr, allowed))
            if tags:
                raise Unusable(f"turn {number} is from {tags.get(role, role)!r}; expected {expected} there")
            if previous in ("", "system"):
                raise Unusable(f"the first message after the system's is not the user's but of role {role!r}")
            raise Unusable(f"message {number} is of role {role!r} after {previous!r}; expected {expected}")
        previous = role


def merge_calls(messages: Sequence[Message]) -> list[Message]:
    """Join consecutive messages of the assistant: texts, reasoning and calls of one turn.

    Raises:
        Unusable: only some of them have a loss.
    """
    merged: list[Message] = []
    for message in messages:
        if not merged or not merged[-1]["role"] == message["role"] == "assistant":
            merged.append(message)
            continue
        last = merged[-1]
        if last.get("loss", True) != message.get("loss", True):
            raise Unusable("parallel tool calls in turns of their own, of which some have a loss and some have none")
        joined = {**last, "tool_calls": [*last.get("tool_calls", []), *message["tool_calls"]]}
        for key in ("content", "reasoning_content"):
            if key in last or key in message:
                joined[key] = "\n".join(text for text in (last.get(key), message.get(key)) if text)
        merged[-1] = joined
    return merged
