"""What a record of each format holds: conversations, in one form.

    {"role": "system" | "user" | "assistant" | "tool", "content": str,
     "reasoning_content": str, "tool_calls": [{"name": ..., "arguments": ...}]}      # the last two may be absent

| format | handlers |
|---|---|
| alpaca: instruction, input, output, and by --map-keys history, system | AlpacaStyle... |
| sharegpt: conversations of {from, value}, roles human, gpt, function_call, observation, system | SharegptStyle... |
| openai: messages of {role, content, tool_calls}, tools | OpenAI... |
| general: instruction, input, output; belle: instruction of Human: and Assistant:, output | General..., Belle... |
| leetcode: code_with_problem, code_only, explanation_only | LeetcodePython... |
| minimind: conversations of {role, content, reasoning_content, tools, tool_calls}, the last two as JSON | MiniMind... |

The columns and their defaults are MindSpeed-LLM's (tasks/preprocess/utils.py), MiniMind's those of its
dataset/lm_dataset.py. Where MindSpeed-LLM skips a record or trains on an empty dialogue in its place,
here the record is rejected with its reason.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from minimind_mcore.preprocess.readers import kind_of

Message = dict[str, Any]
Columns = Mapping[str, str]

ALPACA = {"prompt": "instruction", "query": "input", "response": "output", "history": "", "system": ""}
TAGS = {
    **{"role_tag": "from", "content_tag": "value", "user_tag": "human", "assistant_tag": "gpt"},
    **{"observation_tag": "observation", "function_tag": "function_call", "system_tag": "system"},
}
SHAREGPT = {"messages": "conversations", "system": "", "tools": "", **TAGS}
OPENAI = {"messages": "messages", "system": "", "tools": "tools"}
MINIMIND = {"messages": "conversations"}
AGENT = {**MINIMIND, "gt": "gt"}
PAIR = {"chosen": "chosen", "rejected": "rejected"}
GENERAL = {"prompt": "instruction", "query": "input", "response": "output"}
BELLE = {"prompt": "instruction", "response": "output"}
LEETCODE = {"problem": "code_with_problem", "code": "code_only", "explanation": "explanation_only"}

ROLES = ("system", "user", "assistant", "tool")


class Unusable(Exception):
    """A record that cannot be used; the message is the reason, in a few words."""


@dataclass(frozen=True)
class Conversation:
    """Messages in the form above, and the tools that may be called, as OpenAI describes them."""

    messages: Sequence[Message]
    tools: list[Any] | None = None


def text_of(record: Mapping[str, Any], field: str) -> str:
    """The string in a field.

    Raises:
        Unusable: there is none.
    """
    value = record.get(field)
    if value is None:
        raise Unusable(f"field {field!r} {'is null' if field in record else 'is missing'}")
    if not isinstance(value, str):
        raise Unusable(f"field {field!r} is not a string but {kind_of(value)}")
    return value


def optional(record: Mapping[str, Any], field: str) -> str:
    """The string in a field that may be absent, null or unnamed."""
    return text_of(record, field) if field and record.get(field) is not None else ""


def list_of(record: Mapping[str, Any], field: str) -> list[dict[str, Any]]:
    """The non-empty list of objects in a field."""
    value = record.get(field)
    if not isinstance(value, list):
        raise Unusable(f"field {field!r} is not a list of messages but {kind_of(value)}")
    if not value or not all(isinstance(item, dict) for item in value):
        raise Unusable(f"field {field!r} is {'a list of other things than messages' if value else 'empty'}")
    return value


def _json_list(value: Any, name: str) -> list[Any]:
    """A list that may be given as JSON text, as MiniMind's files do; a single object counts as one."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise Unusable(f"{name} is not valid JSON: {error}") from error
    value = [value] if isinstance(value, dict) else value
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise Unusable(f"{name} is not a list of objects but {kind_of(value)}")
    return value


def _calls(value: Any, name: str) -> list[Any]:
    calls = _json_list(value, name)
    for call in calls:
        function = call.get("function") or call
        if not isinstance(function, dict) or not isinstance(function.get("name"), str) or "arguments" not in function:
            raise Unusable(f"{name}: a call needs name and arguments")
    return calls


def _system(text: str) -> list[Message]:
    return [{"role": "system", "content": text}] if text else []


def openai_messages(turns: Sequence[Mapping[str, Any]]) -> list[Message]:
    """Messages with role and content; content may be null beside tool calls.

    Raises:
        Unusable: an unknown role, or no text.
    """
    messages = []
    for number, turn in enumerate(turns, 1):
        role, content, calls = turn.get("role"), turn.get("content"), turn.get("tool_calls")
        if role not in ROLES:
            raise Unusable(f"message {number} has the role {role!r}; expected {', '.join(ROLES)}")
        if not isinstance(content, str) and not (content is None and calls):
            raise Unusable(f"message {number} has no string under 'content' but {kind_of(content)}")
        message: Message = {"role": role, "content": content or ""}
        if turn.get("reasoning_content") is not None:
            message["reasoning_content"] = text_of(turn, "reasoning_content")
        if calls:
            message["tool_calls"] = _calls(calls, f"message {number}: tool_calls")
        messages.append(message)
    return messages


def read_minimind(record: Mapping[str, Any], columns: Columns) -> dict[str, Conversation]:
    """MiniMind's own: tools are on the system message (the Ascend fork calls them functions)."""
    return {"": minimind_conversation(list_of(record, columns["messages"]))}


def minimind_conversation(turns: Sequence[Mapping[str, Any]]) -> Conversation:
    """Messages, and the tools that the system message carries.

    Raises:
        Unusable: see `openai_messages`; or tools that are no list of objects.
    """
    tools = None
    for turn in turns:
        given = turn.get("tools") or turn.get("functions")
        if turn.get("role") == "system" and given:
            tools = _json_list(given, "tools")
    return Conversation(openai_messages(turns), tools)


def read_minimind_pair(record: Mapping[str, Any], columns: Columns) -> dict[str, Conversation]:
    """MiniMind's preferences: two whole conversations."""
    return {f"{side}_": minimind_conversation(list_of(record, columns[side])) for side in ("chosen", "rejected")}


def read_prompt(record: Mapping[str, Any], columns: Columns) -> dict[str, Conversation]:
    """MiniMind's tasks for reinforcement learning: the last message is a placeholder for the answer."""
    conversation = minimind_conversation(list_of(record, columns["messages"]))
    if len(conversation.messages) < 2:
        raise Unusable("a prompt and the placeholder of its answer are two messages at least, found one")
    if "gt" in columns and not isinstance(record.get(columns["gt"]), list):
        raise Unusable(f"field {columns['gt']!r} is not a list of answers but {kind_of(record.get(columns['gt']))}")
    return {"": Conversation(conversation.messages[:-1], conversation.tools)}


def read_openai(record: Mapping[str, Any], columns: Columns) -> dict[str, Conversation]:
    """OpenAI's chat format."""
    messages = openai_messages(list_of(record, columns["messages"]))
    if messages[0]["role"] != "system":
        messages = _system(optional(record, columns["system"])) + messages
    opening = messages[1:2] if messages[0]["role"] == "system" else messages[:1]
    if not opening or opening[0]["role"] != "user":
        raise Unusable("the first message after the system's is not the user's")
    if messages[-1]["role"] != "assistant":
        raise Unusable(f"the last message is not the assistant's but of role {messages[-1]['role']!r}")
    return {"": Conversation(messages, tools_of(record, columns["tools"]))}


def tools_of(record: Mapping[str, Any], field: str) -> list[Any] | None:
    """The tools in a field that may be absent, empty or unnamed.

    Raises:
        Unusable: no list of objects, nor JSON text of one.
    """
    return _json_list(record[field], f"field {field!r}") or None if field and record.get(field) else None


def alpaca_prompt(record: Mapping[str, Any], columns: Columns) -> list[Message]:
    """Alpaca's question with what comes before it: system prompt and history."""
    messages = _system(optional(record, columns["system"]))
    history = record.get(columns["history"]) if columns["history"] else None
    for pair in history or []:
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            raise Unusable(f"field {columns['history']!r} is not a list of pairs (question, answer)")
        messages += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    parts = [text_of(record, columns["prompt"]) if columns["prompt"] else "", optional(record, columns["query"])]
    return [*messages, {"role": "user", "content": "\n".join(part for part in parts if part)}]


def read_alpaca(record: Mapping[str, Any], columns: Columns) -> dict[str, Conversation]:
    """Alpaca: instruction and input are one message, a line break between them."""
    answer = {"role": "assistant", "content": text_of(record, columns["response"])}
    return {"": Conversation([*alpaca_prompt(record, columns), answer])}


def read_alpaca_pair(record: Mapping[str, Any], columns: Columns) -> dict[str, Conversation]:
    """Alpaca with two answers."""
    prompt = alpaca_prompt(record, columns)
    return {
        f"{side}_": Conversation([*prompt, {"role": "assistant", "content": text_of(record, columns[side])}])
        for side in ("chosen", "rejected")
    }


def _sharegpt_message(turn: Mapping[str, Any], number: int, columns: Columns) -> Message:
    """One turn: of the user's or a tool's at odd places, of the assistant's at even ones."""
    role, content = turn.get(columns["role_tag"]), turn.get(columns["content_tag"])
    odd = {columns["user_tag"]: "user", columns["observation_tag"]: "tool"}
    even = {columns["assistant_tag"]: "assistant", columns["function_tag"]: "calls"}
    expected = odd if number % 2 else even
    if role not in expected:
        raise Unusable(f"turn {number} is from {role!r}; expected {' or '.join(map(repr, expected))} there")
    if not isinstance(content, str):
        raise Unusable(f"turn {number} has no string under {columns['content_tag']!r} but {kind_of(content)}")
    if expected[role] == "calls":
        thought, end, rest = (
            content.partition("</think>") if content.lstrip().startswith("<think>") else ("", "", content)
        )
        calls = _calls(rest, f"turn {number}")
        return {"role": "assistant", "content": thought + end, "tool_calls": calls}
    return {"role": expected[role], "content": content}


def _sharegpt(record: Mapping[str, Any], columns: Columns) -> tuple[list[Message], list[Message], int]:
    turns = list_of(record, columns["messages"])
    system = optional(record, columns["system"])
    if turns[0].get(columns["role_tag"]) == columns["system_tag"]:
        system, turns = text_of(turns[0], columns["content_tag"]), turns[1:]
    messages = [_sharegpt_message(turn, number, columns) for number, turn in enumerate(turns, 1)]
    return _system(system), messages, len(turns)


def read_sharegpt(record: Mapping[str, Any], columns: Columns) -> dict[str, Conversation]:
    """ShareGPT: turns of both sides, one after the other."""
    system, messages, count = _sharegpt(record, columns)
    if not count or count % 2:
        raise Unusable(f"{count} turns; questions and answers in pairs are an even number")
    return {"": Conversation(system + messages, tools_of(record, columns["tools"]))}


def read_sharegpt_pair(record: Mapping[str, Any], columns: Columns) -> dict[str, Conversation]:
    """ShareGPT with two answers, each a turn of its own."""
    system, messages, count = _sharegpt(record, columns)
    if count % 2 == 0:
        raise Unusable(f"{count} turns before the two answers; the last must be the user's: an odd number")
    sides = {}
    for side in ("chosen", "rejected"):
        answer = record.get(columns[side])
        if not isinstance(answer, dict):
            raise Unusable(f"field {columns[side]!r} is not a turn but {kind_of(answer)}")
        answer = _sharegpt_message(answer, count + 1, columns)
        sides[f"{side}_"] = Conversation([*system, *messages, answer], tools_of(record, columns["tools"]))
    return sides


# ------------------------------------------------------------------------------------------------ fixed prompts


def _exchange(question: str, answer: str) -> dict[str, Conversation]:
    return {"": Conversation([{"role": "user", "content": question}, {"role": "assistant", "content": answer}])}


def read_general(record: Mapping[str, Any], columns: Columns) -> dict[str, Conversation]:
    """Instruction and input are one message, a line break between them even if the input is empty."""
    asked, given = text_of(record, columns["prompt"]), optional(record, columns["query"])
    return _exchange(f"{asked}\n{given}", text_of(record, columns["response"]))


def read_belle(record: Mapping[str, Any], columns: Columns) -> dict[str, Conversation]:
    """Belle's dialogues: the instruction has all turns as one text, and ends where the output is to follow.

    What is behind a second "Assistant:" of one turn is left out, and a turn without any is the assistant's.
    """
    messages: list[Message] = []
    for turn in text_of(record, columns["prompt"]).split("Human:"):
        said = [part.strip() for part in turn.split("Assistant:")]
        if turn and len(said) > 1:
            messages.append({"role": "user", "content": said[0]})
        if turn:
            messages.append({"role": "assistant", "content": said[min(1, len(said) - 1)]})
    if not messages:
        raise Unusable(f"field {columns['prompt']!r} has no turn of Human:")
    answer = {"role": "assistant", "content": text_of(record, columns["response"]).strip()}
    return {"": Conversation([*messages[:-1], answer])}


def read_leetcode(record: Mapping[str, Any], columns: Columns) -> dict[str, Conversation]:
    """The problem without its code; the answer is code and explanation."""
    problem = text_of(record, columns["problem"]).partition("```")[0].strip()
    return _exchange(problem, f"{text_of(record, columns['code'])}\n{text_of(record, columns['explanation'])}")
