"""The token ids of an environment's messages: what the chat template adds to a conversation that the policy continued.

    turns = TurnRenderer(tokenizer, thinking=False)
    trajectory.append_observation(turns([{"role": "tool", "content": "42"}]))

A rendering of the real conversation cannot be used. minimind-3's template rewrites every assistant turn with a think
block, so the rendering of a longer conversation does not begin with the ids that the policy generated. Instead the
template renders a dummy question and answer, without and with the messages. The messages are the difference of the
two texts, which depends on the template and the messages alone. The text of an added token in a message, such as
<tool_call> in the output of a tool, is encoded as ordinary text, as the server does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from minimind_mcore.errors import UserError
from minimind_mcore.inference.safe_text import Guard, SafeText
from minimind_mcore.rl.runtime.engines.protocol import Ids

ANSWER = "ANSWER"
CALL = {"id": "call_0", "type": "function", "function": {"name": "dummy", "arguments": {}}}
Message = Mapping[str, Any]


class TurnRenderer:
    """Renders messages that follow a turn of the policy, up to the opening of its next turn.

    Args:
        tokenizer: a transformers tokenizer with a chat template.
        thinking: whether the next turn opens a thought. None leaves the choice to the template.
    """

    def __init__(self, tokenizer: Any, thinking: bool | None = None) -> None:
        self.tokenizer, self.safe = tokenizer, SafeText(tokenizer)
        # MiniMind's name of the switch, and Qwen3's
        self.switches = {} if thinking is None else {"open_thinking": thinking, "enable_thinking": thinking}

    def __call__(self, messages: Sequence[Message], tools: Sequence[Any] | None = None, closed: bool = True) -> Ids:
        """Return the ids that follow the policy's turn.

        Args:
            messages: messages of the environment, such as the results of tools.
            tools: tool definitions of the prompt.
            closed: the policy's turn ends with the end token. Otherwise the returned ids begin with that token.

        Raises:
            UserError: the template refuses the messages, or changes earlier turns when messages follow.
        """
        calls = {"tool_calls": [CALL]} if messages[0]["role"] == "tool" else {}
        dummy: list[Message] = [
            {"role": "user", "content": "QUESTION"},
            {"role": "assistant", "content": ANSWER, **calls},
        ]
        said: list[Message] = [dict(message) for message in messages]
        guard = Guard(self.safe, [said, tools])
        said = [message if message["role"] == "assistant" else guard(message) for message in said]
        before = self._render(dummy, tools)
        whole = self._render([*dummy, *said], tools, add_generation_prompt=True, **self.switches)
        end = self.tokenizer.eos_token
        head, _, closing = before.rpartition(end)
        if not head or ANSWER in closing:
            raise UserError(
                f"chat template of {self.tokenizer.name_or_path}: an assistant turn is {before!r}, which does not end "
                f"with the end token {end!r}. Set eos_token to the token that ends a turn"
            )
        ids, head_ids = guard.encode(whole), guard.encode(head + end)
        rest = guard.encode(closing + whole[len(before) :])
        if not whole.startswith(before) or ids != head_ids + rest:
            raise UserError(
                f"chat template of {self.tokenizer.name_or_path}: it changes the turns before a new message: "
                f"{before!r} became {whole[: len(before)]!r}. Several turns need a template that only appends, such as "
                "MiniMind's"
            )
        return np.array(rest if closed else guard.encode(end) + rest, np.int32)

    def _render(self, messages: Sequence[Message], tools: Sequence[Any] | None, **options: Any) -> str:
        from jinja2 import TemplateError

        try:
            return str(self.tokenizer.apply_chat_template(list(messages), tools=tools, tokenize=False, **options))
        except TemplateError as error:
            raise UserError(
                f"chat template of {self.tokenizer.name_or_path}: it refuses an environment's messages: {error}"
            ) from error
