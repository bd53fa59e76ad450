"""Public tool-calling datasets as conversations in MiniMind's form.

| dataset | record |
|---|---|
| hermes (NousResearch/hermes-function-calling-v1) | conversations of {from: system, human, gpt or tool, value}, tools as JSON text; calls are <tool_call> blocks in gpt's text, as JSON or as Python literals |
| glaive (hiyouga/glaive-function-calling-v2-sharegpt) | conversations of {from: human, gpt, function_call or observation, value}, tools as JSON text |
| glaive (glaiveai/glaive-function-calling-v2) | system with the JSON of the functions, chat with USER:, ASSISTANT: <functioncall> and FUNCTION RESPONSE: |
| xlam (Salesforce/xlam-function-calling-60k) | query, answers and tools as JSON text; parameters are {name: {type: Python's, description, default}} |

Definitions come from the field `tools`, or from the JSON objects in the system text. They are never guessed from calls, so
tools that were offered and not called stay. With tools the system text, which explains the format of calls, is left out:
the chat template writes its own. Without tools hermes keeps the system text: in its JSON mode this text holds the schema
of the answer. A record that calls a tool which is not offered is rejected.
"""  # noqa: E501

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator, Mapping, Sequence

from minimind_mcore.preprocess.messages import (
    Columns,
    Conversation,
    Message,
    Unusable,
    check_order,
    is_empty,
    list_of,
    merge_calls,
    text_of,
    tools_of,
)
from minimind_mcore.tools.parser import parse, strict_json

HERMES = {"messages": "conversations", "tools": "tools"}
GLAIVE = {"messages": "conversations", "tools": "tools", "system": "system", "chat": "chat"}
XLAM = {"query": "query", "answers": "answers", "tools": "tools"}
Record = Mapping[str, object]

_CALL = re.compile(r"(<tool_call>)(.*?)(</tool_call>)", re.DOTALL)
_RESPONSE = re.compile(r"<tool_response>(.*?)</tool_response>", re.DOTALL)
_QUOTED = re.compile(r'("arguments"\s*:\s*)\'(.*)\'(\s*\})\s*$', re.DOTALL)  # glaive: the arguments' JSON in '
_TURN = re.compile(r"^\s*(USER|ASSISTANT|FUNCTION RESPONSE):", re.MULTILINE)  # within a line it is what somebody says
_TYPES = {
    "str": "string", "int": "integer", "float": "number", "bool": "boolean", "list": "array", "tuple": "array",
    "set": "array", "dict": "object",
}  # fmt: skip


def read_hermes(record: Record, columns: Columns) -> dict[str, Conversation]:
    """Return a record of hermes."""
    turns = list_of(record, columns["messages"])
    system = "\n".join(str(turn.get("value")) for turn in turns if turn.get("from") == "system")
    tools = _tools(record, columns, system)
    messages: list[Message] = []
    for number, turn in enumerate(turns, 1):
        role, text = turn.get("from"), turn.get("value")
        if not isinstance(text, str):
            raise Unusable(f"turn {number} has no text under 'value'")
        if role == "human":
            messages.append({"role": "user", "content": text})
        elif role == "tool":
            messages += [{"role": "tool", "content": found.strip()} for found in _RESPONSE.findall(text) or [text]]
        elif role == "gpt":
            messages.append(_assistant(text))
        elif role != "system":
            raise Unusable(f"turn {number} is from {role!r}; expected 'system', 'human', 'gpt' or 'tool'")
    return _conversation(messages, tools, system)


def read_glaive(record: Record, columns: Columns) -> dict[str, Conversation]:
    """Return a record of glaive, in either form."""
    if not is_empty(record.get(columns["chat"])):
        return _glaive_text(record, columns)
    turns = list_of(record, columns["messages"])
    system = [str(turn.get("value")) for turn in turns if turn.get("from") == "system"]
    tools = _tools(record, columns, "\n".join([*system, str(record.get(columns["system"]) or "")]))
    roles = {"human": "user", "gpt": "assistant", "observation": "tool"}
    messages: list[Message] = []
    for number, turn in enumerate(turns, 1):
        role, text = str(turn.get("from")), turn.get("value")
        if not isinstance(text, str):
            raise Unusable(f"turn {number} has no text under 'value'")
        if role == "function_call":
            messages.append(_calling([_glaive_call(text)]))
        elif role in roles:
            messages.append({"role": roles[role], "content": text.strip()})
        elif role != "system":
            raise Unusable(f"turn {number} is from {role!r}; expected {', '.join(map(repr, roles))} or 'function_call'")
    return _conversation(messages, tools)


def _glaive_text(record: Record, columns: Columns) -> dict[str, Conversation]:
    """Return a record whose dialogue is one text."""
    _, *parts = _TURN.split(text_of(record, columns["chat"]))
    messages: list[Message] = []
    for role, part in zip(parts[::2], parts[1::2], strict=True):
        text = part.replace("<|endoftext|>", "").strip()
        said, mark, call = text.partition("<functioncall>")
        if role == "ASSISTANT" and mark:
            messages.append({**_calling([_glaive_call(call)]), "content": said.strip()})
        else:
            name = {"USER": "user", "ASSISTANT": "assistant", "FUNCTION RESPONSE": "tool"}[role]
            messages.append({"role": name, "content": text})
    return _conversation(messages, _tools(record, columns, str(record.get(columns["system"]) or "")))


def read_xlam(record: Record, columns: Columns) -> dict[str, Conversation]:
    """Return a record of xlam: one question, and one answer with all calls."""
    calls = tools_of(record, columns["answers"])
    if not calls:
        raise Unusable(f"field {columns['answers']!r} has no calls")
    tools = [_xlam_definition(tool) for tool in tools_of(record, columns["tools"]) or []]
    question = {"role": "user", "content": text_of(record, columns["query"])}
    return _conversation([question, _calling(calls)], tools)


def _xlam_definition(tool: Mapping[str, object]) -> dict[str, object]:
    """Return a definition in OpenAI's form; xlam has Python's types, such as "List[int], optional"."""
    properties: dict[str, object] = {}
    required: list[str] = []
    given = tool.get("parameters")
    for name, described in given.items() if isinstance(given, Mapping) else ():
        described = described if isinstance(described, Mapping) else {}
        kind, _, rest = str(described.get("type", "str")).partition(",")
        schema = {"type": _TYPES.get(re.split(r"\W", kind.strip().lower())[0], "string")}
        properties[name] = schema | {key: value for key, value in described.items() if key != "type" and value != ""}
        if "optional" not in rest and "default" not in described:
            required.append(name)
    parameters = {"type": "object", "properties": properties, "required": required}
    description = {"description": tool["description"]} if tool.get("description") else {}
    return {"type": "function", "function": {"name": tool.get("name"), **description, "parameters": parameters}}


def _assistant(text: str) -> Message:
    """Return a turn of gpt in hermes."""

    def as_json(block: re.Match[str]) -> str:
        return block[1] + json.dumps(_literal(block[2]), ensure_ascii=False) + block[3]

    reply = parse(_CALL.sub(as_json, text))
    if "<tool_call>" in reply.answer:
        raise Unusable("a call is not valid")
    message: Message = {"role": "assistant", "content": reply.answer.strip()}
    if reply.thinking:
        message["reasoning_content"] = reply.thinking
    if reply.calls:
        message["tool_calls"] = [{"name": call.name, "arguments": call.arguments} for call in reply.calls]
    return message


def _literal(text: str) -> object:
    """Return a value that is written as JSON or as a Python literal."""
    try:
        return strict_json(text)
    except ValueError:
        try:
            return ast.literal_eval(text.strip())
        except (ValueError, SyntaxError, MemoryError, RecursionError) as error:
            raise Unusable("a call is not valid") from error


def _glaive_call(text: str) -> object:
    """Return a call of glaive, whose arguments may be JSON in single quotes."""
    quoted = _QUOTED.search(text)
    try:
        found = strict_json(text[: quoted.start()] + quoted[1] + quoted[2] + quoted[3] if quoted else text)
        if isinstance(found, dict) and isinstance(found.get("arguments"), str):
            found["arguments"] = strict_json(found["arguments"])
    except ValueError as error:
        raise Unusable("a call is not valid") from error
    return found


def _calling(calls: Sequence[object]) -> Message:
    kept = []
    for call in calls:
        name, arguments = (call.get("name"), call.get("arguments")) if isinstance(call, Mapping) else (None, None)
        if not isinstance(name, str) or not isinstance(arguments, Mapping):
            raise Unusable("a call is not valid")
        kept.append({"name": name, "arguments": arguments})
    return {"role": "assistant", "content": "", "tool_calls": kept}


def _tools(record: Record, columns: Columns, system: str) -> list[dict[str, object]]:
    """Return the definitions of the field `tools`, or else of the JSON objects in the system text."""
    found = tools_of(record, columns["tools"]) or list(_objects(system))
    return [tool if "function" in tool else {"type": "function", "function": tool} for tool in found]


def _objects(text: str) -> Iterator[dict[str, object]]:
    """Yield the definitions that a text holds, also in lists: objects with a name, and a description or parameters."""
    place = 0
    while (place := text.find("{", place)) >= 0:
        try:
            found, end = json.JSONDecoder().raw_decode(text, place)
        except (ValueError, RecursionError):
            place += 1
            continue
        function = found.get("function", found)
        is_named = isinstance(function, dict) and isinstance(function.get("name"), str)
        # A call has arguments. A schema, or an example of an answer, may have a text under "name".
        if is_named and "arguments" not in function and function.keys() & {"description", "parameters"}:
            yield found
        place = end


def _conversation(
    messages: Sequence[Message], tools: list[dict[str, object]], text: str = ""
) -> dict[str, Conversation]:
    """Return the conversation behind its system message.

    With tools this message is empty, and carries the tools in MiniMind's files. Without tools it has the text, if any.
    """
    functions = [tool["function"] for tool in tools]
    names = [function.get("name") for function in functions if isinstance(function, Mapping)]
    for message in messages:
        if any(call["name"] not in names for call in message.get("tool_calls", ())):
            raise Unusable("a tool is called that is not offered")
    check_order(messages)
    if not any(message["role"] == "assistant" for message in messages):
        raise Unusable("no message of the assistant")
    system = [{"role": "system", "content": "" if tools else text}] if tools or text.strip() else []
    return {"": Conversation([*system, *merge_calls(messages)], tools or None)}
