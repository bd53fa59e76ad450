"""From a conversation to ids and labels, by the tokenizer's own chat template.

    template = TokenizerTemplate("tokenizer/")
    turns = template.render(Conversation([{"role": "user", "content": "hi"}, ...]))     # texts to encode
    ids, labels = template.label([encoder.encode(turns[0])[0]])                         # labels: -100 for no loss

Labels are not shifted, as MindSpeed-LLM stores them. The loss is where MiniMind's SFTDataset puts it: on
what is between the ids of "<|im_start|>assistant\\n" and of "<|im_end|>\\n", and on these last two, found in
the ids of the whole text. A template with other marks, as that of a tokenizer without bos, has its own in their place.
(So an answer that begins with line breaks which the tokenizer joins to the one
before has no loss there, and none here.)
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from minimind_mcore.errors import UserError
from minimind_mcore.preprocess.messages import Conversation, Unusable
from minimind_mcore.preprocess.tokenize import Encoder, TokenizerInfo
from minimind_mcore.preprocess.tokenizer_files import template_source

IGNORED = -100
Ids = NDArray[np.int32]
# What a chat template may leave out; one that writes it has the name in its source.
WRITTEN = ("tools", "tool_calls", "reasoning_content")
# The turns of a conversation, each as pieces of text that are encoded one by one.
Turns = list[list[str]]


class ChatTemplate(Protocol):
    """How conversations are written and where their loss is.

    Attributes:
        unwritten: which of `WRITTEN` the template does not write.
    """

    unwritten: frozenset[str]

    def render(self, conversation: Conversation, thinking: bool | None = None) -> Turns:
        """The texts of a conversation.

        Args:
            conversation: the messages.
            thinking: None: the conversation is complete. Else the assistant's next turn is opened, and this
                says whether to let it think.

        Raises:
            Unusable: the template cannot write this conversation.
        """
        ...

    def label(self, turns: Sequence[Ids], learned: Sequence[bool] = ()) -> tuple[Ids, Ids, bool]:
        """Ids, labels, and whether something was cut off.

        Args:
            turns: the ids of each turn of `render`.
            learned: for each message of the assistant, whether it has a loss; empty: all have.

        Raises:
            Unusable: the messages that have no loss cannot be found in the ids.
        """
        ...


class TokenizerTemplate:
    """The chat template that comes with the tokenizer, rendered by transformers.

    Args:
        info: of the tokenizer.
        encoder: of the same tokenizer.
        seq_length: where to cut.
        last_only: loss on the last answer instead of on all.
        labelled: False where only prompts are wanted, and `label` is not called.
    """

    def __init__(
        self,
        info: TokenizerInfo,
        encoder: Encoder,
        seq_length: int | None = None,
        last_only: bool = False,
        labelled: bool = True,
    ) -> None:
        from jinja2 import TemplateError

        from minimind_mcore.preprocess.hf_tokenizer import load_tokenizer

        source = template_source(info.path)
        self.unwritten = frozenset(key for key in WRITTEN if key not in source)
        self._tokenizer: Any = load_tokenizer(info.path)
        self._refusal = TemplateError
        (tokens, (size, _)) = encoder.encode(self._marks(info) if labelled else ("", ""))
        self._opening, self._closing = tokens[:size].tolist(), tokens[size:].tolist()
        self._limit = seq_length
        self._first = -1 if last_only else 0

    def _marks(self, info: TokenizerInfo) -> tuple[str, str]:
        """The texts before and after an answer: MiniMind's, or of a tokenizer that has others the template's.

        Raises:
            UserError: the template does not open an answer with a text of its own.
        """
        names = self._tokenizer
        minimind = (f"{names.bos_token}assistant\n", f"{names.eos_token}\n")
        asked, said = {"role": "user", "content": "QUESTION"}, {"role": "assistant", "content": "ANSWER"}
        try:
            whole = str(names.apply_chat_template([asked, said], tokenize=False))
            question = str(names.apply_chat_template([asked], tokenize=False))
            prompt = str(names.apply_chat_template([asked], tokenize=False, add_generation_prompt=True))
        except self._refusal as error:
            if info.bos_id is not None:  # it may only refuse this conversation
                return minimind
            raise UserError(
                f"tokenizer {info.path}: its chat template refuses a question and its answer: {error}"
            ) from error
        if info.bos_id is not None and all(mark in whole for mark in minimind):
            return minimind
        # What the answer's turn and the generation prompt have in common is less than either: both may add thoughts.
        count = len(question) if whole.startswith(question) and prompt.startswith(question) else len(whole)
        pairs = zip(whole[count:].partition("ANSWER")[0], prompt[count:], strict=False)
        opening = "".join(first for first, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
        closing = whole.rpartition("ANSWER")[2]
        if not opening or not closing:
            raise UserError(
                f"tokenizer {info.path}: its chat template writes {whole!r}; expected a text that opens the answer, "
                "such as <|im_start|>assistant, and one that closes it. Choose another template with --prompt-type"
            )
        return opening, closing

    def render(self, conversation: Conversation, thinking: bool | None = None) -> Turns:
        """See `ChatTemplate`: one text."""
        options = {} if thinking is None else {"add_generation_prompt": True, "open_thinking": thinking}
        try:
            text = self._tokenizer.apply_chat_template(
                list(conversation.messages), tools=conversation.tools, tokenize=False, **options
            )
        except self._refusal as error:
            raise Unusable(f"the tokenizer's chat template refuses it: {error}") from error
        return [[text]]

    def label(self, turns: Sequence[Ids], learned: Sequence[bool] = ()) -> tuple[Ids, Ids, bool]:
        """See `ChatTemplate`: cut at the sequence length, a cut answer still has its loss, as in MiniMind."""
        [ids] = turns
        labels = np.full(len(ids), IGNORED, np.int32)
        answers = self._answers(ids)
        heard = [True] * len(answers) if all(learned) else list(learned)
        if len(heard) != len(answers):  # MiniMind's markers stand in a text, or an answer begins with a line break
            raise Unusable(
                f"{len(heard)} answers, of which some have no loss, but the text has {len(answers)} places that look "
                "like the beginning of an answer; remove the template's markers from the texts"
            )
        for (start, stop), kept in list(zip(answers, heard, strict=True))[self._first :]:
            labels[start:stop] = ids[start:stop] if kept else IGNORED
        limit = self._limit
        return ids[:limit], labels[:limit], limit is not None and len(ids) > limit

    def _answers(self, ids: Ids) -> list[tuple[int, int]]:
        """From behind each opening to behind the closing that follows it, or to the end."""
        openings, closings = _positions(ids, self._opening), _positions(ids, self._closing)
        answers, position = [], 0
        for opening in openings:
            if opening < position:  # inside of the answer before
                continue
            start = opening + len(self._opening)
            nearest = np.searchsorted(closings, start)
            position = closings[nearest] + len(self._closing) if nearest < len(closings) else len(ids)
            answers.append((start, position))
        return answers


def _positions(ids: Ids, pattern: Sequence[int]) -> list[int]:
    """Where a run of ids occurs."""
    count = len(ids) - len(pattern) + 1
    if count <= 0:
        return []
    found = ids[:count] == pattern[0]
    for offset, token in enumerate(pattern[1:], 1):
        found &= ids[offset : count + offset] == token
    return [int(place) for place in np.flatnonzero(found)]


def checked(turns: Turns) -> Turns:
    """The turns, if every tokenizer can encode them.

    Raises:
        Unusable: half of a surrogate pair.
    """
    try:
        for pieces in turns:
            for piece in pieces:
                piece.encode("utf-8")
    except UnicodeEncodeError as error:
        raise Unusable("a lone surrogate or invalid UTF-8 in a message") from error
    return turns
