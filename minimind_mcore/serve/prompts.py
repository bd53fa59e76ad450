"""Prompts of strangers: what they write is text, and never a token that structures the chat.

minimind-3 has <|im_end|>, <think>, <tool_call> and <tool_response> as added tokens. A user who writes one of them
could end the turn and speak as somebody else. Here the text of an added token in a message of a system, a user or a
tool, or in the definition of a tool, is encoded as ordinary text. The messages of the assistant keep the ids that the
model wrote.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Mapping
from typing import Any

import tokenizers

from minimind_mcore.errors import UserError
from minimind_mcore.inference.prompts import Message, is_text
from minimind_mcore.preprocess.tokenize import added_ids, document_frame

# Arguments of apply_chat_template that a request may not set.
RESERVED = frozenset(
    "conversation messages tools documents chat_template add_generation_prompt continue_final_message tokenize padding "
    "truncation max_length return_tensors return_dict return_assistant_tokens_mask tokenizer_kwargs".split()
)


class SafePrompts:
    """Encodes chats and texts.

    Args:
        tokenizer: of transformers.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer, self.backend = tokenizer, tokenizer.backend_tokenizer
        self._added = {token for token, _ in self.backend.get_added_tokens_decoder().items()}
        content = json.loads(self.backend.to_str())
        content |= {"added_tokens": [], "post_processor": None, "truncation": None, "padding": None}
        self._plain = tokenizers.Tokenizer.from_str(json.dumps(content))
        self._before: list[int] = document_frame(added_ids(self.backend), tokenizer.bos_token_id, None)[0]

    def raw(self, text: str) -> list[int]:
        """The ids of a text as a pretrained model has seen texts: BOS comes first.

        Raises:
            UserError: it is not a text.
        """
        return [*self._before, *self.encode(text)]

    def encode(self, text: str) -> list[int]:
        """The ids of a text, as transformers gives them.

        Raises:
            UserError: it is not a text.
        """
        if not is_text(text):
            raise UserError("the prompt has a lone surrogate, which no encoding of Unicode has; remove it")
        # A batch, as `encode` would hold Python's lock for the seconds that the longest texts take.
        ids: list[int] = self.backend.encode_batch_fast([text], add_special_tokens=False)[0].ids
        return ids

    def plain(self, text: str) -> list[int]:
        """The ids of a text without added tokens."""
        ids: list[int] = self._plain.encode(text, add_special_tokens=False).ids
        if self._added.isdisjoint(ids):
            return ids
        # A vocabulary that has the whole text as an ordinary entry, too.
        pieces = [self._plain.encode(character, add_special_tokens=False).ids for character in text]
        return list(itertools.chain.from_iterable(pieces))

    def chat(
        self,
        messages: list[Message],
        tools: list[Any] | None,
        switches: Mapping[str, Any],
        add_generation_prompt: bool = True,
    ) -> tuple[list[int], bool]:
        """The ids of a chat, and whether they end inside of a thought.

        Args:
            messages: the chat.
            tools: definitions.
            switches: further arguments of the chat template.
            add_generation_prompt: end with the beginning of an answer.

        Raises:
            UserError: the chat template refuses the chat, or something in it is not a text.
        """
        texts: list[str] = []
        mark = _unused(json.dumps([messages, tools], ensure_ascii=False))
        safe = [
            message if message["role"] == "assistant" else self._guarded(message, mark, texts) for message in messages
        ]
        rendered = self._render(safe, self._guarded(tools, mark, texts), switches, add_generation_prompt)
        # tojson may write the mark as an escape.
        pieces = re.split(rf"(?:{mark}|\\u{ord(mark):04x})(\d+)(?:{mark}|\\u{ord(mark):04x})", rendered)
        encoded = [
            self.plain(texts[int(piece)]) if odd else self.encode(piece)
            for piece, odd in zip(pieces, itertools.cycle((False, True)), strict=False)
        ]
        return list(itertools.chain.from_iterable(encoded)), rendered.rstrip().endswith("<think>")

    def _guarded(self, value: Any, mark: str, texts: list[str]) -> Any:
        """The same value with marks in place of added tokens' texts, which are appended to `texts`."""
        if isinstance(value, list):
            return [self._guarded(part, mark, texts) for part in value]
        if isinstance(value, dict):
            return {self._guarded(k, mark, texts): self._guarded(v, mark, texts) for k, v in value.items()}
        if not isinstance(value, str) or not is_text(value):
            return value
        found, end, encoded = [], 0, self.backend.encode_batch([value], add_special_tokens=False)[0]
        for number, token in enumerate(encoded.ids):
            if token in self._added:
                start, stop = encoded.token_to_chars(number) or (end, end)
                found += [value[end:start], f"{mark}{len(texts)}{mark}"]
                texts.append(value[start:stop])
                end = stop
        return "".join([*found, value[end:]]) if found else value

    def _render(
        self, messages: list[Message], tools: Any, switches: Mapping[str, Any], add_generation_prompt: bool
    ) -> str:
        from jinja2 import TemplateError

        if taken := RESERVED & set(switches):
            raise UserError(f"chat_template_kwargs: {', '.join(sorted(taken))} cannot be set by a request")
        try:
            text: str = self.tokenizer.apply_chat_template(
                messages, tools=tools, tokenize=False, add_generation_prompt=add_generation_prompt, **switches
            )
        except (TemplateError, TypeError, ValueError, LookupError, AttributeError, RecursionError) as error:
            raise UserError(f"the chat template refuses this chat: {str(error)[:200]}") from error
        return text


def _unused(text: str) -> str:
    """A character of Unicode's private use area that a text does not have.

    Raises:
        UserError: it has them all.
    """
    unused = set(map(chr, range(0xE000, 0xF900))).difference(text)
    if not unused:
        raise UserError("the chat has every character of Unicode's private use area; expected some text")
    return min(unused)
