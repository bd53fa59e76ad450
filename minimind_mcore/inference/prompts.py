"""Prompts: where they come from, and the ids that a model gets.

A prompt is a conversation; a line of text is one with a single message of the user. A model that has had
supervised fine-tuning gets it through the tokenizer's chat template. One that is only pretrained has seen bos
and text, and gets that (`raw`), as in MiniMind's eval_llm.py.
"""

from __future__ import annotations

import io
import itertools
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TextIO

from minimind_mcore.errors import UserError
from minimind_mcore.preprocess.messages import (
    Conversation,
    Unusable,
    conversation_of,
    is_empty,
    optional,
    report_unused,
    tools_of,
)
from minimind_mcore.preprocess.readers import sound_records
from minimind_mcore.preprocess.templates import SlotTemplate
from minimind_mcore.preprocess.tokenize import added_ids, document_frame

Message = dict[str, Any]
KEYS = ("prompt", "text", "messages", "conversations")
# Fields of a record that belong to its prompt.
BESIDE = {"system": "system", "tools": "tools"}


@dataclass(frozen=True)
class Prompt:
    """A conversation that the assistant is to continue.

    Attributes:
        messages: {"role": ..., "content": ...}, the last one not the assistant's.
        tools: definitions, in OpenAI's form.
    """

    messages: list[Message]
    tools: list[Any] | None = None

    @property
    def text(self) -> str:
        """What the user said last."""
        return str(self.messages[-1].get("content", ""))


def from_text(text: str, system: str | None = None, tools: list[Any] | None = None) -> Prompt:
    """A prompt that is one line of the user."""
    opening = [{"role": "system", "content": system}] if system else []
    return Prompt([*opening, {"role": "user", "content": text}], tools)


def read_prompts(
    texts: Sequence[str], file: str | None, system: str | None = None, tools: list[Any] | None = None
) -> list[Prompt]:
    """The prompts of `--prompt` and `--prompt-file`; where neither is given, of stdin, one a line.

    Raises:
        UserError: none at all, or a file that is no such thing.
    """
    prompts = [from_text(text, system, tools) for text in texts]
    if file is not None:
        prompts += [prompt for _, _, prompt in records(file, system, tools)]
    if not texts and file is None:
        if sys.stdin.isatty():
            raise UserError("no prompt: give --prompt TEXT (again and again), --prompt-file FILE, or lines on stdin")
        lines = [line.rstrip("\n") for line in text_input() if line.strip()]
        if unreadable := [number for number, line in enumerate(lines, 1) if not is_text(line)]:
            raise UserError(f"stdin: prompt {unreadable[0]} is not in {sys.stdin.encoding}; convert it")
        prompts += [from_text(line, system, tools) for line in lines]
    if not prompts:
        raise UserError(f"no prompt in {file or 'stdin'}: expected at least one line")
    return prompts


def text_input() -> TextIO:
    """stdin, where bytes that are no text become what `is_text` refuses, and not an end of the reading."""
    if isinstance(sys.stdin, io.TextIOWrapper) and sys.stdin.errors != "surrogateescape":
        sys.stdin.reconfigure(errors="surrogateescape")
    return sys.stdin


def is_text(line: str) -> bool:
    """Whether a tokenizer can encode it: no half of a surrogate pair, no escaped byte."""
    try:
        line.encode()
    except UnicodeEncodeError:
        return False
    return True


def records(
    spec: str, system: str | None = None, tools: list[Any] | None = None, used: Sequence[str] = ()
) -> Iterator[tuple[str, Any, Prompt]]:
    """Where each record of files of prompts is, the record, and the prompt that it holds.

    At the end the keys that nothing reads are reported.

    Args:
        spec: files, directories, globs.
        system, tools: for prompts that have none of their own.
        used: fields of a record that the caller reads.

    Raises:
        UserError: no file there, or a record that holds none.
    """
    unused = Counter[str]()
    for where, record in sound_records(spec):
        key, prompt, keys = _of_record(record, where, system, tools)
        unused.update(keys)
        read = {key, *BESIDE, *used}
        unused.update(name for name, value in record.items() if name not in read and not is_empty(value))
        yield where, record, prompt
    report_unused(unused)


def _of_record(
    record: Any, where: str, system: str | None, tools: list[Any] | None
) -> tuple[str, Prompt, Sequence[str]]:
    """A prompt of a record: {"prompt": TEXT}, {"text": TEXT}, or a conversation in MiniMind's form or OpenAI's.

    An answer at the end is the reference, and left out. `system` and `tools` may stand next to the prompt.

    Returns:
        The field that holds the prompt, the prompt, and the keys of its messages that nothing reads.
    """
    key = next((key for key in KEYS if isinstance(record, dict) and record.get(key)), None)
    if key is None:
        raise UserError(f"{where}: expected an object with one of {', '.join(KEYS)}")
    value = record[key]
    try:
        if isinstance(value, str):
            own = optional(record, "system") or system
            return key, from_text(value, own, tools_of(record, "tools") or tools), ()
        turns: list[Any] = value if isinstance(value, list) else [None]
        if not all(isinstance(turn, dict) and isinstance(turn.get("role"), str) for turn in turns):
            raise UserError(f"{where}: {key}: expected a text, or a list of objects with role and content")
        conversation = conversation_of(record, {"messages": key, **BESIDE}, turns, asked=True)
    except Unusable as reason:
        raise UserError(f"{where}: {reason}") from reason
    messages = list(conversation.messages)
    if system and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": system}, *messages]
    return key, Prompt(messages, conversation.tools or tools), conversation.unused


class PromptEncoder:
    """Turns prompts into ids.

    Args:
        tokenizer: of transformers.
        raw: bos and text; else the chat template.
        thinking: whether to let the model think; None leaves that to the template.
        template: of --prompt-type, in place of the tokenizer's own.

    Raises:
        UserError: the tokenizer has no chat template, and one is needed.
    """

    def __init__(
        self, tokenizer: Any, raw: bool, thinking: bool | None = None, template: SlotTemplate | None = None
    ) -> None:
        if not raw and template is None and not tokenizer.chat_template:
            raise UserError(
                "the tokenizer has no chat template: give --raw, --prompt-type, or a tokenizer that has one"
            )
        self.tokenizer, self.raw, self.thinking, self.template = tokenizer, raw, thinking, template
        # A raw prompt begins as a document does; see `preprocess.stages.Documents`.
        self._before = document_frame(added_ids(tokenizer.backend_tokenizer), tokenizer.bos_token_id, None)[0]
        # MiniMind's name of the switch, and Qwen3's
        self.switches = {} if thinking is None else {"open_thinking": thinking, "enable_thinking": thinking}

    def text(self, prompt: Prompt) -> str:
        """What the model reads."""
        before = self.tokenizer.decode(self._before) if self.raw else ""
        return before + "".join(self._pieces(prompt))

    def _pieces(self, prompt: Prompt) -> list[str]:
        """The same, in the parts that are encoded one by one.

        Raises:
            UserError: the template refuses it, or something in it is no text.
        """
        pieces = self._of_template(prompt, self.template) if self.template else [self._text(prompt)]
        if not all(map(is_text, pieces)):
            raise UserError("a prompt, or what comes with it, has a lone surrogate or bytes that are not in UTF-8")
        return pieces

    def _of_template(self, prompt: Prompt, template: SlotTemplate) -> list[str]:
        """What the template writes before an answer.

        Raises:
            UserError: it cannot write this conversation.
        """
        asked = Conversation(prompt.messages, prompt.tools)
        try:
            return list(itertools.chain.from_iterable(template.render(asked, thinking=bool(self.thinking))))
        except Unusable as reason:
            raise UserError(f"--prompt-type: a prompt that it cannot write: {reason}") from reason

    def _text(self, prompt: Prompt) -> str:
        if self.raw:
            return "".join(str(m.get("content", "")) for m in prompt.messages)
        from jinja2 import TemplateError

        try:
            text: str = self.tokenizer.apply_chat_template(
                prompt.messages, tools=prompt.tools, tokenize=False, add_generation_prompt=True, **self.switches
            )
        except TemplateError as error:
            raise UserError(f"the tokenizer's chat template refuses a conversation: {error}") from error
        return text

    def __call__(self, prompt: Prompt) -> list[int]:
        """The ids of a prompt."""
        pieces = self.tokenizer(self._pieces(prompt), add_special_tokens=False)["input_ids"]
        return [*(self._before if self.raw else []), *itertools.chain.from_iterable(pieces)]
