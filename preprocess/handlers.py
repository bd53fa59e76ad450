"""The handlers of --handler-name: what a record is converted to.

A pretraining handler converts a parsed record and the requested keys to one text per key. A fine-tuning handler
converts a record to conversations (`conversations`). Both may return a `Reject`. Tasks for reinforcement learning also
have a right answer, with which responses are compared:

| format | handler |
|---|---|
| alpaca columns, by --map-keys: DeepScaler, math-cl, this kit's sample | R1AlpacaStyleInstructionHandler |
| sharegpt turns | R1SharegptStyleInstructionHandler |
| DAPO's Math-17k: prompt is a list of messages, reward_model.ground_truth | Math17kAlpacaStyleInstructionHandler |
| Orz-57k: [{from: human, value}, {from: assistant, ground_truth: {value}}] | OrzMathHandler |
| MiniMind's agent_rl_math: conversations, gt | MiniMindMathHandler |

The columns are MindSpeed-RL's (datasets/handler_utils.py). MindSpeed-RL drops the earlier answers of a history, and
trains on an empty question if a record has several answers. Here, as in MindSpeed-LLM, the earlier answers are kept,
and a record with several right answers is rejected.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from minimind_mcore.errors import UserError
from minimind_mcore.preprocess.conversations import (
    AGENT,
    ALPACA,
    BELLE,
    BESIDE,
    GENERAL,
    LEETCODE,
    MINIMIND,
    OPENAI,
    PAIR,
    SHAREGPT,
    STEPS,
    TAGS,
    alpaca_prompt,
    read_alpaca,
    read_alpaca_pair,
    read_belle,
    read_general,
    read_leetcode,
    read_minimind,
    read_minimind_pair,
    read_openai,
    read_prompt,
    read_sharegpt,
    read_sharegpt_pair,
    read_steps,
)
from minimind_mcore.preprocess.messages import (
    PROMPTS,
    REASONING,
    Columns,
    Conversation,
    Unusable,
    conversation_of,
    is_empty,
    list_of,
    text_of,
    tools_of,
)
from minimind_mcore.preprocess.readers import Reject, kind_of, rejected
from minimind_mcore.preprocess.tool_records import GLAIVE, HERMES, XLAM, read_glaive, read_hermes, read_xlam

MATH17K = {"prompt": "prompt", "query": "", "response": "reward_model", "history": "", "system": ""}
ORZ = {"messages": "messages"}


def read_alpaca_prompt(record: Mapping[str, Any], columns: Columns) -> dict[str, Conversation]:
    """Read Alpaca's question."""
    return {"": Conversation(alpaca_prompt(record, columns), tools_of(record, columns.get("tools", "")))}


def answer_of_alpaca(record: Mapping[str, Any], columns: Columns) -> str:
    """Return Alpaca's output. A list with one entry counts as that entry."""
    value = record.get(columns["response"])
    if isinstance(value, list):
        if len(value) != 1 or not isinstance(value[0], str):
            raise Unusable(f"field {columns['response']!r} has {len(value)} answers; expected one text")
        return value[0]
    return text_of(record, columns["response"])


def read_sharegpt_prompt(record: Mapping[str, Any], columns: Columns) -> dict[str, Conversation]:
    """Read ShareGPT's turns up to the last answer."""
    conversation = read_sharegpt(record, columns)[""]
    return {"": replace(conversation, messages=conversation.messages[:-1])}


def answer_of_sharegpt(record: Mapping[str, Any], columns: Columns) -> str:
    """Return ShareGPT's last answer."""
    return str(read_sharegpt(record, columns)[""].messages[-1]["content"])


def read_math17k(record: Mapping[str, Any], columns: Columns) -> dict[str, Conversation]:
    """Read a question that is a list of messages or a text."""
    if isinstance(record.get(columns["prompt"]), str):
        return read_alpaca_prompt(record, columns)
    field = columns["prompt"]
    return {"": conversation_of(record, {"messages": field}, list_of(record, field), asked=True)}


def answer_of_math17k(record: Mapping[str, Any], columns: Columns) -> str:
    """Return the column's `ground_truth` if the column is an object, else its text."""
    value = record.get(columns["response"])
    if isinstance(value, dict):
        return text_of(value, "ground_truth")
    return text_of(record, columns["response"])


def _orz_turns(record: Mapping[str, Any], columns: Columns) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    turns = list_of(record, columns["messages"])
    if len(turns) != 2 or turns[0].get("from") != "human" or not isinstance(turns[1].get("ground_truth"), dict):
        raise Unusable("expected two turns, the first from human with value, the second with ground_truth")
    return turns[0], turns[1]


def read_orz(record: Mapping[str, Any], columns: Columns) -> dict[str, Conversation]:
    """Read Open-Reasoner-Zero's question."""
    return {"": Conversation([{"role": "user", "content": text_of(_orz_turns(record, columns)[0], "value")}])}


def answer_of_orz(record: Mapping[str, Any], columns: Columns) -> str:
    """Return Open-Reasoner-Zero's answer."""
    return text_of(_orz_turns(record, columns)[1]["ground_truth"], "value")


def read_math(record: Mapping[str, Any], columns: Columns) -> dict[str, Conversation]:
    """Read MiniMind's task with an answer. Its tools are dropped, because a single turn cannot call them."""
    conversation = read_prompt(record, columns)[""]
    messages = [m for m in conversation.messages if m["role"] != "system" or m["content"]]
    return {"": Conversation(messages, unused=conversation.unused)}


def answer_of_gt(record: Mapping[str, Any], columns: Columns) -> str:
    """Return MiniMind's answers, joined by commas. The records file keeps the list itself."""
    values = record.get(columns["gt"])
    if not isinstance(values, list) or not all(isinstance(value, str | int | float) for value in values):
        raise Unusable(f"field {columns['gt']!r} is not a list of answers but {kind_of(values)}")
    return ", ".join(map(str, values))


@dataclass(frozen=True)
class Handler:
    """A pretraining handler.

    Attributes:
        text: returns the text for a record's fields and one key.
        fields: fields that the handler reads. Empty: the keys themselves.
    """

    text: Callable[[Mapping[str, Any], str], str]
    fields: tuple[str, ...] = ()

    def columns(self, keys: Sequence[str]) -> Sequence[str]:
        """Return the fields to read for these keys."""
        return self.fields or keys

    def unused(self, record: Mapping[str, Any], keys: Sequence[str]) -> list[str]:
        """Return the non-empty fields that the handler does not read."""
        return unread(record, self.columns(keys))

    def __call__(self, record: Any, keys: Sequence[str]) -> dict[str, str] | Reject:
        """Return the text for each key. A record with an unusable key is rejected as a whole."""
        if not isinstance(record, dict):
            return rejected(f"not an object but {kind_of(record)}", record)
        texts = {}
        for key in keys:
            try:
                texts[key] = self.text(record, key)
                texts[key].encode("utf-8")
            except Unusable as reason:
                return rejected(str(reason), record)
            except UnicodeEncodeError as error:
                place = error.start + 1
                return rejected(f"field {key!r} has a lone surrogate or invalid UTF-8 at character {place}", record)
        return texts


def unread(record: Mapping[str, Any], fields: Sequence[str]) -> list[str]:
    """Return the non-empty fields of a record that are not in `fields`."""
    return [field for field, value in record.items() if field not in fields and not is_empty(value)]


def _alpaca(record: Mapping[str, Any], key: str) -> str:
    """Return an Alpaca record (instruction, input, output) as a prompt. `key` only names the dataset."""
    instruction, output = text_of(record, "instruction"), text_of(record, "output")
    # For a record without input MindSpeed-LLM's template prints Python's None.
    given = f" Input:\n{text_of(record, 'input')}" if record.get("input") else None
    return PROMPTS["alpaca"].format(instruction=instruction, input=given, output=output)


def _sharegpt(record: Mapping[str, Any], key: str) -> str:
    """Return the turns of a conversation (`value` or `content`), concatenated without separator."""
    turns = record.get(key)
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise Unusable(f"field {key!r} is not a list of turns but {kind_of(turns)}")
    # In a parquet file every turn has both columns, and one of them is null.
    texts = [turn.get("content") if turn.get("value") is None else turn["value"] for turn in turns]
    for number, text in enumerate(texts, 1):
        if not isinstance(text, str):
            raise Unusable(f"field {key!r}: turn {number} has no string under 'value' or 'content'")
    return "".join(texts)


HANDLERS: Mapping[str, Handler] = {
    "GeneralPretrainHandler": Handler(text_of),
    "AlpacaPretrainHandler": Handler(_alpaca, ("instruction", "input", "output")),
    "SharegptPretrainHandler": Handler(_sharegpt),
}


@dataclass(frozen=True)
class ChatHandler:
    """A fine-tuning handler.

    Attributes:
        read: returns the conversations of a record, by the prefix of their outputs: "" or, of a pair, "chosen_" and
            "rejected_".
        columns: field of each column. --map-keys changes it.
        outputs: the datasets, with MindSpeed-LLM's names: `<prefix>_packed_<output>_document`.
        minimind: MiniMind's own format, with its random changes and a loss on every answer.
        prompts: a record is a task for reinforcement learning: a prompt without its answer. The first two outputs are
            the ids and the mask of the prompt. Each further output is another text of the task: `labels`, the right
            answer, or a field of the record.
        answer: for tasks: returns the right answer.
        step_rewards: each placeholder in the text has a reward token as its label, for process reward models.
        fixed_prompt: the text has the form of `PROMPTS["instruction"]`, not of a chat template.
        thinking_ratio: for tasks: default share of prompts that let the model think (as in MiniMind's trainers).
        others: further fields that are read. --map-keys cannot rename them.
    """

    read: Callable[[Mapping[str, Any], Columns], dict[str, Conversation]]
    columns: Columns
    outputs: tuple[str, ...] = ("input_ids", "attention_mask", "labels")
    minimind: bool = False
    prompts: bool = False
    answer: Callable[[Mapping[str, Any], Columns], str] | None = None
    step_rewards: bool = False
    fixed_prompt: bool = False
    thinking_ratio: float | None = None
    others: tuple[str, ...] = ()

    @property
    def pairwise(self) -> bool:
        """Whether a record has a chosen and a rejected answer."""
        return "chosen_input_ids" in self.outputs

    @property
    def fields(self) -> list[str] | None:
        """The columns to read from a parquet file. None for all, because the records file keeps every field."""
        if self.prompts:
            return None
        return [*(field for name, field in self.columns.items() if field and name not in TAGS), *self.others]

    def unused(self, record: Mapping[str, Any], sides: Mapping[str, Conversation]) -> list[str]:
        """Return the non-empty keys of a record and its messages that are not read.

        All fields of a task are kept in the records file.
        """
        fields = unread(record, self.fields or ()) if not self.prompts else []
        counts = Counter[str]()
        for conversation in sides.values():  # both sides of a pair read the same shared fields
            counts |= Counter(conversation.unused)
        return [*fields, *counts.elements()]

    def __call__(self, record: Any) -> dict[str, Conversation] | Reject:
        """Return the conversations of a record."""
        try:
            if not isinstance(record, dict):
                raise Unusable(f"not an object but {kind_of(record)}")
            return self.read(record, self.columns)
        except Unusable as reason:
            return rejected(str(reason), record)

    def extras(self, record: Mapping[str, Any]) -> list[str]:
        """Return the texts of a task's datasets after the first two.

        Raises:
            Unusable: a text is missing or empty.
        """
        texts = [
            self.answer(record, self.columns) if name == "labels" and self.answer else text_of(record, name)
            for name in self.outputs[2:]
        ]
        for name, text in zip(self.outputs[2:], texts, strict=True):
            if not text:
                raise Unusable(f"its {'answer' if name == 'labels' else name} is empty")
        return texts

    def with_keys(self, name: str, keys: Sequence[str]) -> ChatHandler:
        """Return this handler with --dataset-additional-keys as the outputs after the ids and the mask.

        Raises:
            UserError: the handler does not write tasks, or has no answer for `labels`.
        """
        if not keys:
            return self
        if not self.prompts or ("labels" in keys and self.answer is None):
            raise UserError(
                f"--dataset-additional-keys {' '.join(keys)}: {name} "
                + ("has no answer for labels" if self.prompts else "writes no tasks for reinforcement learning")
            )
        return dataclasses.replace(self, outputs=(*_PROMPT_OUTPUTS, *keys))

    def mapped(self, name: str, map_keys: Mapping[str, Any] | None) -> ChatHandler:
        """Return this handler with the columns of --map-keys, in MindSpeed-LLM's form: {column: field of the record}.

        The field "" disables a column. `tags` has the names of roles and keys in ShareGPT's turns. Columns that are
        not given keep their defaults (MindSpeed-LLM drops them).

        Raises:
            UserError: the format has no such column.
        """
        given = map_keys or {}
        if not isinstance(given, dict) or not isinstance(given.get("tags") or {}, dict):
            raise UserError(
                f'--map-keys {map_keys}: expected an object like {{"prompt": "question"}}; tags is an object too'
            )
        given = dict(given)
        if any(tag in self.columns for tag in TAGS):
            given |= given.pop("tags", None) or {}
        unknown = [key for key in given if key not in self.columns]
        if unknown:
            columns = [
                *(key for key in self.columns if key not in TAGS),
                *(["tags"] if "role_tag" in self.columns else []),
            ]
            tags = f"; in tags: {', '.join(TAGS)}" if "role_tag" in self.columns else ""
            raise UserError(f"--map-keys: {unknown[0]!r} is not a column of {name}; it has {', '.join(columns)}{tags}")
        wrong = [key for key, field in given.items() if field is not None and not isinstance(field, str)]
        if wrong:
            raise UserError(
                f'--map-keys: {wrong[0]!r} is {given[wrong[0]]!r}; expected the name of a field, or "" for none'
            )
        return dataclasses.replace(self, columns={**self.columns, **{key: field or "" for key, field in given.items()}})


_PAIR_OUTPUTS = ("chosen_input_ids", "chosen_labels", "rejected_input_ids", "rejected_labels")
_PROMPT_OUTPUTS = ("input_ids", "attention_mask")


def _task(
    read: Callable[[Mapping[str, Any], Columns], dict[str, Conversation]],
    columns: Columns,
    answer: Callable[[Mapping[str, Any], Columns], str],
) -> ChatHandler:
    """Return a handler of tasks with an answer."""
    return ChatHandler(read, columns, (*_PROMPT_OUTPUTS, "labels"), prompts=True, answer=answer, thinking_ratio=0.0)


_ALPACA_PAIR = {**{key: field for key, field in ALPACA.items() if key != "response"}, **PAIR}

CHAT_HANDLERS: Mapping[str, ChatHandler] = {
    "AlpacaStyleInstructionHandler": ChatHandler(read_alpaca, ALPACA, others=REASONING),
    "SharegptStyleInstructionHandler": ChatHandler(read_sharegpt, SHAREGPT),
    "OpenAIInstructionHandler": ChatHandler(read_openai, OPENAI),
    "AlpacaStylePairwiseHandler": ChatHandler(read_alpaca_pair, _ALPACA_PAIR, _PAIR_OUTPUTS),
    "SharegptStylePairwiseHandler": ChatHandler(read_sharegpt_pair, {**SHAREGPT, **PAIR}, _PAIR_OUTPUTS),
    "GeneralInstructionHandler": ChatHandler(read_general, GENERAL, fixed_prompt=True),
    "BelleMultiTurnInstructionHandler": ChatHandler(read_belle, BELLE, fixed_prompt=True),
    "LeetcodePythonInstructionHandler": ChatHandler(read_leetcode, LEETCODE, fixed_prompt=True),
    # From MindSpeed-LLM 2.0.0 to 2.2.0. Version 2.3.0 dropped process reward models.
    "AlpacaStyleProcessRewardHandler": ChatHandler(read_steps, STEPS, fixed_prompt=True, step_rewards=True),
    # MiniMind's own files: sft, lora, reason and tool calls; dpo; rlaif; agent_rl
    "MiniMindInstructionHandler": ChatHandler(read_minimind, MINIMIND, minimind=True),
    "MiniMindPairwiseHandler": ChatHandler(read_minimind_pair, {**PAIR, **BESIDE}, _PAIR_OUTPUTS, minimind=True),
    "MiniMindPromptHandler": ChatHandler(
        read_prompt, MINIMIND, _PROMPT_OUTPUTS, minimind=True, prompts=True, thinking_ratio=0.9
    ),
    "MiniMindAgentHandler": ChatHandler(
        read_prompt, AGENT, _PROMPT_OUTPUTS, minimind=True, prompts=True, thinking_ratio=0.1
    ),
    # Public tool-calling datasets
    "HermesToolHandler": ChatHandler(read_hermes, HERMES, minimind=True),
    "GlaiveToolHandler": ChatHandler(read_glaive, GLAIVE, minimind=True),
    "XlamToolHandler": ChatHandler(read_xlam, XLAM, minimind=True),
    # agent_rl_math with its answers, without its tools
    "MiniMindMathHandler": _task(read_math, AGENT, answer_of_gt),
    # Handlers of MindSpeed-LLM and MindSpeed-RL
    "R1AlpacaStyleInstructionHandler": _task(read_alpaca_prompt, ALPACA, answer_of_alpaca),
    "R1SharegptStyleInstructionHandler": _task(read_sharegpt_prompt, SHAREGPT, answer_of_sharegpt),
    "Math17kAlpacaStyleInstructionHandler": _task(read_math17k, MATH17K, answer_of_math17k),
    "PPOAlpacaStyleInstructionHandler": ChatHandler(
        read_alpaca_prompt, ALPACA, _PROMPT_OUTPUTS, prompts=True, thinking_ratio=0.0
    ),
    # Open-Reasoner-Zero's own file: a record is a list of two turns
    "OrzMathHandler": _task(read_orz, ORZ, answer_of_orz),
}


# Handlers of MindSpeed-LLM that are not supported.
REFUSED: Mapping[str, str] = {
    "HunyuanInstructionHandler": "it finds the answers by <|extra_0|> and <|eos|>, tokens of HunyuanLarge",
    "MOSSMultiTurnHandler": "it writes ids 195 and 196, which mark turns only in Baichuan's vocabulary",
    "MOSSInstructionHandler": "its data repeats each dialogue once for every turn; convert it to messages and use "
    "OpenAIInstructionHandler",
    "LlamaFactoryInstructionHandler": "it selects a handler by dataset_info.json; use AlpacaStyleInstructionHandler "
    "or SharegptStyleInstructionHandler with --map-keys",
    "StackOverflowPythonPretrainHandler": "in MindSpeed-LLM itself it returns nothing and fails on the first record",
}


def find_handler(name: str) -> Handler | ChatHandler:
    """Return the handler of a name.

    Raises:
        UserError: the name is unknown. (MindSpeed-LLM uses GeneralPretrainHandler for an unknown name, so that
            a misspelt instruction handler produces data of the wrong kind.)
    """
    handler = HANDLERS.get(name) or CHAT_HANDLERS.get(name)
    if name in REFUSED:
        raise UserError(f"--handler-name {name}: not in this kit: {REFUSED[name]}")
    if handler is None:
        raise UserError(f"--handler-name {name}: unknown; this version knows {', '.join([*HANDLERS, *CHAT_HANDLERS])}")
    return handler
