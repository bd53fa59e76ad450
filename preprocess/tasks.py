"""Tasks for reinforcement learning in each format: the question, and the right answer to compare responses with.

| format | handler |
|---|---|
| alpaca columns, by --map-keys: DeepScaler, math-cl, this kit's sample | R1AlpacaStyleInstructionHandler |
| sharegpt turns | R1SharegptStyleInstructionHandler |
| DAPO's Math-17k: prompt is a list of messages, reward_model.ground_truth | Math17kAlpacaStyleInstructionHandler |
| Orz-57k: [{from: human, value}, {from: assistant, ground_truth: {value}}] | OrzMathHandler |
| MiniMind's agent_rl_math: conversations, gt | MiniMindMathHandler |

The columns are MindSpeed-RL's (datasets/handler_utils.py). It drops the earlier answers of a history, and
trains on an empty question where a record has several answers; here, as in MindSpeed-LLM, the former stay, and
such a record is rejected.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from minimind_mcore.preprocess.conversations import alpaca_prompt, read_prompt, read_sharegpt
from minimind_mcore.preprocess.messages import (
    Columns,
    Conversation,
    Unusable,
    conversation_of,
    list_of,
    text_of,
    tools_of,
)
from minimind_mcore.preprocess.readers import kind_of

MATH17K = {"prompt": "prompt", "query": "", "response": "reward_model", "history": "", "system": ""}
ORZ = {"messages": "messages"}


def read_alpaca_prompt(record: Mapping[str, Any], columns: Columns) -> dict[str, Conversation]:
    """Alpaca's question."""
    return {"": Conversation(alpaca_prompt(record, columns), tools_of(record, columns.get("tools", "")))}


def answer_of_alpaca(record: Mapping[str, Any], columns: Columns) -> str:
    """Alpaca's output; a list of one counts as that one."""
    value = record.get(columns["response"])
    if isinstance(value, list):
        if len(value) != 1 or not isinstance(value[0], str):
            raise Unusable(f"field {columns['response']!r} has {len(value)} answers; expected one text")
        return value[0]
    return text_of(record, columns["response"])


def read_sharegpt_prompt(record: Mapping[str, Any], columns: Columns) -> dict[str, Conversation]:
    """ShareGPT's turns up to the last answer."""
    conversation = read_sharegpt(record, columns)[""]
    return {"": replace(conversation, messages=conversation.messages[:-1])}


def answer_of_sharegpt(record: Mapping[str, Any], columns: Columns) -> str:
    """ShareGPT's last answer."""
    return str(read_sharegpt(record, columns)[""].messages[-1]["content"])


def read_math17k(record: Mapping[str, Any], columns: Columns) -> dict[str, Conversation]:
    """A question that is a list of messages, or a text."""
    if isinstance(record.get(columns["prompt"]), str):
        return read_alpaca_prompt(record, columns)
    field = columns["prompt"]
    return {"": conversation_of(record, {"messages": field}, list_of(record, field), asked=True)}


def answer_of_math17k(record: Mapping[str, Any], columns: Columns) -> str:
    """`ground_truth` of the column, or the column itself."""
    value = record.get(columns["response"])
    if isinstance(value, dict):
        return text_of(value, "ground_truth")
    return text_of(record, columns["response"])


def _orz_turns(record: Mapping[str, Any], columns: Columns) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    turns = list_of(record, columns["messages"])
    if len(turns) != 2 or turns[0].get("from") != "human" or not isinstance(turns[1].get("ground_truth"), dict):
        raise Unusable("not two turns, the human's with value and the assistant's with ground_truth")
    return turns[0], turns[1]


def read_orz(record: Mapping[str, Any], columns: Columns) -> dict[str, Conversation]:
    """Open-Reasoner-Zero's question."""
    return {"": Conversation([{"role": "user", "content": text_of(_orz_turns(record, columns)[0], "value")}])}


def answer_of_orz(record: Mapping[str, Any], columns: Columns) -> str:
    """Open-Reasoner-Zero's answer."""
    return text_of(_orz_turns(record, columns)[1]["ground_truth"], "value")


def read_math(record: Mapping[str, Any], columns: Columns) -> dict[str, Conversation]:
    """MiniMind's task with an answer, without its tools: a single turn cannot call them."""
    conversation = read_prompt(record, columns)[""]
    messages = [m for m in conversation.messages if m["role"] != "system" or m["content"]]
    return {"": Conversation(messages, unused=conversation.unused)}


def answer_of_gt(record: Mapping[str, Any], columns: Columns) -> str:
    """MiniMind's answers, several with commas between; the list itself is in the line beside the ids."""
    values = record.get(columns["gt"])
    if not isinstance(values, list) or not all(isinstance(value, str | int | float) for value in values):
        raise Unusable(f"field {columns['gt']!r} is not a list of answers but {kind_of(values)}")
    return ", ".join(map(str, values))
