"""From a conversation to ids and labels, by the tokenizer's own chat template.

    template = TokenizerTemplate("tokenizer/")
    turns = template.render(Conversation([{"role": "user", "content": "hi"}, ...]))     # texts to encode
    ids, labels = template.label([encoder.encode(turns[0])[0]])                         # labels: -100 for no loss

Labels are not shifted, as MindSpeed-LLM stores them. The loss is where MiniMind's SFTDataset puts it: on
what is between the ids of "<|im_start|>assistant\\n" and of "<|im_end|>\\n", and on these last two, found in
the ids of the whole text. (So an answer that begins with line breaks which the tokenizer joins to the one
before has no loss there, and none here.)
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from minimind_mcore.errors import UserError
from minimind_mcore.preprocess.messages import Conversation, Unusable
from minimind_mcore.preprocess.tokenize import Encoder, TokenizerInfo, tokenizer_json

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


def template_source(tokenizer: str | os.PathLike[str]) -> str:
    """The chat template of a tokenizer directory, as text.

    Raises:
        UserError: it has none.
    """
    folder = tokenizer_json(tokenizer).parent
    file, config = folder / "chat_template.jinja", folder / "tokenizer_config.json"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    found = json.loads(config.read_text(encoding="utf-8")).get("chat_template") if config.is_file() else None
    if not found:
        raise UserError(
            f"tokenizer {tokenizer}: no chat template in tokenizer_config.json or chat_template.jinja, which "
            "conversations need; take MiniMind's tokenizer, or choose a template with --prompt-type"
        )
    return found if isinstance(found, str) else json.dumps(found, sort_keys=True)


class TokenizerTemplate:
    """The chat template that comes with the tokenizer, rendered by transformers.

    Args:
        info: of the tokenizer.
        encoder: of the same tokenizer.
        seq_length: where to cut.
        last_only: loss on the last answer instead of on all.
    """

    def __init__(
        self, info: TokenizerInfo, encoder: Encoder, seq_length: int | None = None, last_only: bool = False
    ) -> None:
        from jinja2 import TemplateError
        from transformers import AutoTokenizer

        source = template_source(info.path)
        self.unwritten = frozenset(key for key in WRITTEN if key not in source)
        self._tokenizer: Any = AutoTokenizer.from_pretrained(tokenizer_json(info.path).parent)
        opening, closing = f"{self._tokenizer.bos_token}assistant\n", f"{self._tokenizer.eos_token}\n"
        (tokens, (size, _)) = encoder.encode([opening, closing])
        self._opening, self._closing = tokens[:size].tolist(), tokens[size:].tolist()
        self._refusal = TemplateError
        self._limit = seq_length
        self._first = -1 if last_only else 0

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
