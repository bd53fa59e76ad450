"""Read prompts, and convert them to ids.

A prompt is a conversation. A line of text is a conversation with a single message of the user. A model after supervised
fine-tuning gets the prompt in the tokenizer's chat template. A base model gets bos and the text (`raw`), as in
MiniMind's eval_llm.py.

Text in a message that looks like an added token, such as <|im_end|>, is encoded as ordinary text, as the server does:
see `safe_text`. Messages of the assistant are the exception, because a model writes such tokens. So are raw prompts,
because pretraining data has the tokens. Every other prompt has the ids of transformers.
"""

from __future__ import annotations

import functools
import io
import itertools
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TextIO

from minimind_mcore.errors import UserError
from minimind_mcore.inference.safe_text import Guard, SafeText, is_text
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
    """A conversation that the assistant continues.

    Attributes:
        messages: {"role": ..., "content": ...}. The last one is not the assistant's.
        tools: definitions in OpenAI's form.
    """

    messages: list[Message]
    tools: list[Any] | None = None

    @property
    def text(self) -> str:
        """The last message of the user."""
        return str(self.messages[-1].get("content", ""))


def from_text(text: str, system: str | None = None, tools: list[Any] | None = None) -> Prompt:
    """Return a prompt with one line of the user."""
    opening = [{"role": "system", "content": system}] if system else []
    return Prompt([*opening, {"role": "user", "content": text}], tools)


def read_prompts(
    texts: Sequence[str], file: str | None, system: str | None = None, tools: list[Any] | None = None
) -> list[Prompt]:
    """Read the prompts of `--prompt` and `--prompt-file`, or of stdin, one per line.

    Raises:
        UserError: there is no prompt, or a file cannot be read.
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
    """Return stdin, with invalid bytes converted to characters that `is_text` refuses, so that reading continues."""
    if isinstance(sys.stdin, io.TextIOWrapper) and sys.stdin.errors != "surrogateescape":
        sys.stdin.reconfigure(errors="surrogateescape")
    return sys.stdin


def records(
    spec: str, system: str | None = None, tools: list[Any] | None = None, used: Sequence[str] = ()
) -> Iterator[tuple[str, Any, Prompt]]:
    """Yield for each record of prompt files its place for messages, the record, and its prompt.

    Unread keys are logged at the end.

    Args:
        spec: files, directories, globs.
        system, tools: for prompts without their own.
        used: fields of a record that the caller reads.

    Raises:
        UserError: a file does not exist, or a record has no prompt.
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
    """Read the prompt of a record: {"prompt": TEXT}, {"text": TEXT}, or a conversation in MiniMind's or OpenAI's form.

    An answer at the end is the reference, and is dropped. `system` and `tools` may stand next to the prompt.

    Returns:
        The field with the prompt, the prompt, and the unread keys of its messages.
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
    """Converts prompts to ids.

    Args:
        tokenizer: a transformers tokenizer.
        raw: use bos and text instead of the chat template.
        thinking: whether the model may think. None leaves the choice to the template.
        template: template of --prompt-type, instead of the tokenizer's own.

    Raises:
        UserError: a chat template is needed, and the tokenizer has none.
    """

    def __init__(
        self, tokenizer: Any, raw: bool, thinking: bool | None = None, template: SlotTemplate | None = None
    ) -> None:
        if not raw and template is None and not tokenizer.chat_template:
            raise UserError(
                "the tokenizer has no chat template: give --raw, --prompt-type, or a tokenizer that has one"
            )
        self.tokenizer, self.raw, self.thinking, self.template = tokenizer, raw, thinking, template
        # A raw prompt starts like a document in pretraining; see `preprocess.stages.Documents`.
        self._before = document_frame(added_ids(tokenizer.backend_tokenizer), tokenizer.bos_token_id, None)[0]
        # The names of the option in MiniMind and in Qwen3
        self.switches = {} if thinking is None else {"open_thinking": thinking, "enable_thinking": thinking}

    @functools.cached_property
    def _safe(self) -> SafeText:
        return SafeText(self.tokenizer)

    def text(self, prompt: Prompt) -> str:
        """Return the text that the model gets."""
        before = self.tokenizer.decode(self._before) if self.raw else ""
        return before + "".join(self._pieces(prompt))

    def _pieces(self, prompt: Prompt) -> list[str]:
        """Return the same text in pieces that are encoded separately.

        Raises:
            UserError: the template refuses the conversation, or a text is invalid.
        """
        pieces = self._of_template(prompt, self.template) if self.template else [self._text(prompt)]
        if not all(map(is_text, pieces)):
            raise UserError("a prompt, or what comes with it, has a lone surrogate or bytes that are not in UTF-8")
        return pieces

    def _of_template(self, prompt: Prompt, template: SlotTemplate) -> list[str]:
        """Return the text that the template writes before an answer.

        Raises:
            UserError: the template cannot write this conversation.
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
        """Return the ids of a prompt."""
        if not self.raw:
            guard = Guard(self._safe, [prompt.messages, prompt.tools])
            safe = [message if message["role"] == "assistant" else guard(message) for message in prompt.messages]
            guarded = Prompt(safe, guard(prompt.tools))
            if guard.texts:
                return list(itertools.chain.from_iterable(map(guard.encode, self._pieces(guarded))))
        pieces = self.tokenizer(self._pieces(prompt), add_special_tokens=False)["input_ids"]
        return [*(self._before if self.raw else []), *itertools.chain.from_iterable(pieces)]
