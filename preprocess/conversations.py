"""Read the records of each format as conversations in one common form (`messages`).

| format | handlers |
|---|---|
| alpaca: instruction, input, output, system, tools, and by --map-keys history | AlpacaStyle... |
| sharegpt: conversations of {from, value}, roles human, gpt, function_call, observation, system | SharegptStyle... |
| openai: messages of {role, content, tool_calls}, tools | OpenAI... |
| general: instruction, input, output; belle: instruction of Human: and Assistant:, output | General..., Belle... |
| leetcode: code_with_problem, code_only, explanation_only | LeetcodePython... |
| minimind: conversations of {role, content, reasoning_content, tools, tool_calls}, the last two as JSON | MiniMind... |

The columns and their defaults are MindSpeed-LLM's (tasks/preprocess/utils.py). In addition the fields `system`, `tools`
and `prompt` are read if they exist. MiniMind's columns are those of its dataset/lm_dataset.py. Some invalid records are
skipped by MindSpeed-LLM, or replaced by an empty dialogue. Here such a record is rejected with a reason.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from minimind_mcore.preprocess.messages import (
    Columns,
    Conversation,
    Form,
    Message,
    Unusable,
    calls_of,
    content_of,
    conversation_of,
    is_empty,
    list_of,
    message_of,
    optional,
    reasoning_of,
    text_of,
    tools_of,
)
from minimind_mcore.preprocess.readers import kind_of

ALPACA = {
    **{"prompt": "instruction", "query": "input", "response": "output", "history": ""},
    **{"system": "system", "tools": "tools"},
}
TAGS = {
    **{"role_tag": "from", "content_tag": "value", "user_tag": "human", "assistant_tag": "gpt"},
    **{"observation_tag": "observation", "function_tag": "function_call", "system_tag": "system"},
}
# Fields of a record that belong to the conversation in addition to the messages.
BESIDE = {"system": "system", "tools": "tools", "prompt": "prompt"}
SHAREGPT = {"messages": "conversations", **BESIDE, **TAGS}
OPENAI = {"messages": "messages", **BESIDE}
MINIMIND = {"messages": "conversations", **BESIDE}
AGENT = {**MINIMIND, "gt": "gt"}
PAIR = {"chosen": "chosen", "rejected": "rejected"}
STEPS = {"input": "input", "value": "value"}
GENERAL = {"prompt": "instruction", "query": "input", "response": "output"}
BELLE = {"prompt": "instruction", "response": "output"}
LEETCODE = {"problem": "code_with_problem", "code": "code_only", "explanation": "explanation_only"}


def _system(text: str) -> list[Message]:
    return [{"role": "system", "content": text}] if text else []


def read_minimind(record: Mapping[str, Any], columns: Columns) -> dict[str, Conversation]:
    """Read MiniMind's format: tools are in the system message (`functions` in the Ascend fork) or next to the
    messages."""
    return {"": conversation_of(record, columns, list_of(record, columns["messages"]))}


def read_minimind_pair(record: Mapping[str, Any], columns: Columns) -> dict[str, Conversation]:
    """Read MiniMind's preferences (two whole conversations) or TRL's (a prompt and two answers, as messages or
    texts)."""
    return {
        f"{side}_": conversation_of(record, {**columns, "messages": columns[side]}, _side(record, columns, side))
        for side in ("chosen", "rejected")
    }


def _side(record: Mapping[str, Any], columns: Columns, side: str) -> list[dict[str, Any]]:
    """Return the messages of one side. A text is an answer to the prompt."""
    value = record.get(columns[side])
    if isinstance(value, str) and columns["prompt"] and not is_empty(record.get(columns["prompt"])):
        return [{"role": "assistant", "content": value}]
    return list_of(record, columns[side])


def read_prompt(record: Mapping[str, Any], columns: Columns) -> dict[str, Conversation]:
    """Read MiniMind's tasks for reinforcement learning, or TRL's field `prompt`. An answer at the end is a
    placeholder."""
    if "gt" in columns and not isinstance(record.get(columns["gt"]), list):
        raise Unusable(f"field {columns['gt']!r} is not a list of answers but {kind_of(record.get(columns['gt']))}")
    prompt = columns["prompt"]
    if prompt and is_empty(record.get(columns["messages"])) and not is_empty(record.get(prompt)):
        columns = {**columns, "messages": prompt, "prompt": ""}
        if isinstance(record[prompt], str):
            record = {**record, prompt: [{"role": "user", "content": record[prompt]}]}
    return {"": conversation_of(record, columns, list_of(record, columns["messages"]), asked=True)}


def read_openai(record: Mapping[str, Any], columns: Columns) -> dict[str, Conversation]:
    """Read OpenAI's chat format."""
    conversation = conversation_of(record, columns, list_of(record, columns["messages"]))
    if conversation.messages[-1]["role"] != "assistant":
        raise Unusable(f"the last message is not the assistant's but of role {conversation.messages[-1]['role']!r}")
    return {"": conversation}


def read_steps(record: Mapping[str, Any], columns: Columns) -> dict[str, Conversation]:
    """Read a text with a placeholder after each step of a solution, and the reward token of each step."""
    values = record.get(columns["value"])
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise Unusable(f"field {columns['value']!r} is not a list of texts but {kind_of(values)}")
    return {"": Conversation([{"role": "user", "content": text_of(record, columns["input"]), "rewards": values}])}


def alpaca_prompt(record: Mapping[str, Any], columns: Columns) -> list[Message]:
    """Return Alpaca's question after system prompt and history."""
    messages = _system(optional(record, columns["system"]))
    history = record.get(columns["history"]) if columns["history"] else None
    for pair in history or []:
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            raise Unusable(f"field {columns['history']!r} is not a list of pairs (question, answer)")
        messages += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    parts = [text_of(record, columns["prompt"]) if columns["prompt"] else "", optional(record, columns["query"])]
    return [*messages, {"role": "user", "content": "\n".join(part for part in parts if part)}]


def read_alpaca(record: Mapping[str, Any], columns: Columns) -> dict[str, Conversation]:
    """Read Alpaca: instruction and input form one message, separated by a line break."""
    answer = {"role": "assistant", "content": text_of(record, columns["response"])}
    thoughts = reasoning_of(record, "the record")
    if thoughts:
        answer["reasoning_content"] = thoughts
    return {"": Conversation([*alpaca_prompt(record, columns), answer], tools_of(record, columns["tools"]))}


def read_alpaca_pair(record: Mapping[str, Any], columns: Columns) -> dict[str, Conversation]:
    """Read Alpaca with two answers."""
    prompt = alpaca_prompt(record, columns)
    return {
        f"{side}_": Conversation(
            [*prompt, {"role": "assistant", "content": text_of(record, columns[side])}],
            tools_of(record, columns["tools"]),
        )
        for side in ("chosen", "rejected")
    }


def _sharegpt_form(columns: Columns) -> Form:
    """Return the message form of these columns."""
    tags = {role: columns[f"{role}_tag"] for role in ("system", "user", "assistant")}
    tags["tool"] = columns["observation_tag"]
    return Form(partial(_sharegpt_message, columns), (columns["role_tag"], columns["content_tag"]), tags)


def _sharegpt_message(columns: Columns, turn: Mapping[str, Any], number: int) -> Message:
    """Read one turn. The assistant's tool calls have a tag of their own, and their content is JSON."""
    where, role = f"turn {number}", turn.get(columns["role_tag"])
    roles = {columns["observation_tag"]: "tool", columns["assistant_tag"]: "assistant"}
    roles |= {columns["function_tag"]: "calls", columns["system_tag"]: "system", columns["user_tag"]: "user"}
    if role not in roles:
        raise Unusable(f"{where} is from {role!r}; expected {' or '.join(map(repr, roles))}")
    content = content_of(turn.get(columns["content_tag"]), where, columns["content_tag"])
    if roles[role] != "calls":
        return message_of(turn, roles[role], content, None, where)
    thought, end, rest = content.partition("</think>") if content.lstrip().startswith("<think>") else ("", "", content)
    return message_of(turn, "assistant", thought + end, calls_of(rest, where), where)


def read_sharegpt(record: Mapping[str, Any], columns: Columns) -> dict[str, Conversation]:
    """Read ShareGPT: alternating turns of both sides."""
    turns = list_of(record, columns["messages"])
    conversation = conversation_of(record, columns, turns, _sharegpt_form(columns))
    if conversation.messages[-1]["role"] != "assistant":
        raise Unusable(f"{len(turns)} turns, and the last is not the assistant's")
    return {"": conversation}


def read_sharegpt_pair(record: Mapping[str, Any], columns: Columns) -> dict[str, Conversation]:
    """Read ShareGPT with two answers, each a turn of its own."""
    turns, form, sides = list_of(record, columns["messages"]), _sharegpt_form(columns), {}
    for side in ("chosen", "rejected"):
        answer = record.get(columns[side])
        if not isinstance(answer, dict):
            raise Unusable(f"field {columns[side]!r} is not a turn but {kind_of(answer)}")
        conversation = conversation_of(record, columns, [*turns, answer], form)
        if conversation.messages[-1]["role"] != "assistant":
            raise Unusable(f"field {columns[side]!r} is not a turn of the assistant")
        sides[f"{side}_"] = conversation
    return sides


# ------------------------------------------------------------------------------------------------ fixed prompts


def _exchange(question: str, answer: str) -> dict[str, Conversation]:
    return {"": Conversation([{"role": "user", "content": question}, {"role": "assistant", "content": answer}])}


def read_general(record: Mapping[str, Any], columns: Columns) -> dict[str, Conversation]:
    """Read instruction and input as one message, separated by a line break even if the input is empty."""
    asked, given = text_of(record, columns["prompt"]), optional(record, columns["query"])
    return _exchange(f"{asked}\n{given}", text_of(record, columns["response"]))


def read_belle(record: Mapping[str, Any], columns: Columns) -> dict[str, Conversation]:
    """Read Belle's dialogues: the instruction is one text with all turns, and the output follows it.

    Text after a second "Assistant:" in one turn is dropped. A turn without "Assistant:" belongs to the assistant.
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
    """Read a problem without its code. The answer is code and explanation."""
    problem = text_of(record, columns["problem"]).partition("```")[0].strip()
    return _exchange(problem, f"{text_of(record, columns['code'])}\n{text_of(record, columns['explanation'])}")
