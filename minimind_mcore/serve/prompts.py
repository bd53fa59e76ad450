"""Encode prompts from untrusted clients so that their text never becomes a token that structures the chat.

The text of an added token in a system, user or tool message, or in a tool definition, is encoded as ordinary text
(`inference/safe_text.py`). In messages of the assistant the text becomes the added token again, as in the ids that the
model generated.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from minimind_mcore.errors import UserError
from minimind_mcore.inference.prompts import Message
from minimind_mcore.inference.safe_text import Guard, SafeText
from minimind_mcore.preprocess.tokenize import added_ids, document_frame

# Arguments of apply_chat_template that a request must not set.
RESERVED = frozenset(
    "conversation messages tools documents chat_template add_generation_prompt continue_final_message tokenize padding "
    "truncation max_length return_tensors return_dict return_assistant_tokens_mask tokenizer_kwargs".split()
)


class SafePrompts:
    """Encodes chats and texts.

    Args:
        tokenizer: a transformers tokenizer.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer, self.safe = tokenizer, SafeText(tokenizer)
        self.encode = self.safe.encode
        self._before: list[int] = document_frame(added_ids(self.safe.backend), tokenizer.bos_token_id, None)[0]

    def raw(self, text: str) -> list[int]:
        """Return the ids of a text in the form of pretraining data: BOS comes first.

        Raises:
            UserError: the text is not valid Unicode.
        """
        return [*self._before, *self.encode(text)]

    def chat(
        self,
        messages: list[Message],
        tools: list[Any] | None,
        switches: Mapping[str, Any],
        add_generation_prompt: bool = True,
    ) -> tuple[list[int], bool]:
        """Return the ids of a chat, and whether they end inside a thinking block.

        Args:
            messages: the chat.
            tools: tool definitions.
            switches: further arguments of the chat template.
            add_generation_prompt: end with the start of an answer.

        Raises:
            UserError: the chat template refuses the chat, or a text is not valid Unicode.
        """
        guard = Guard(self.safe, [messages, tools])
        safe = [message if message["role"] == "assistant" else guard(message) for message in messages]
        rendered = self._render(safe, guard(tools), switches, add_generation_prompt)
        return guard.encode(rendered), rendered.rstrip().endswith("<think>")

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
