"""Constrain text to a grammar: the JSON of `response_format`, and tool calls that `tool_choice` requires.

llguidance computes which tokens may follow. A grammar can start after a thought and end the answer.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minimind_mcore.errors import UserError
from minimind_mcore.tools.parser import TAGS


@functools.lru_cache(maxsize=1)
def _vocabulary(tokenizer: Any, stop: tuple[int, ...]) -> Any:
    """Return llguidance's tokenizer, which takes a second to build."""
    from llguidance.hf import from_tokenizer  # pyright: ignore[reportMissingImports]

    return from_tokenizer(tokenizer, eos_token=list(stop))


def json_grammar(schema: dict[str, Any] | None) -> str:
    """Return the grammar of a JSON schema, or for None of any JSON object.

    Raises:
        UserError: the schema is not supported, or is not valid Unicode.
    """
    from llguidance import LLMatcher  # pyright: ignore[reportMissingImports]

    # The separators of the chat template's tojson, which the model saw in training.
    try:
        return str(
            LLMatcher.grammar_from_json_schema(
                schema or {"type": "object"},
                overrides={"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "},
            )
        )
    except ValueError as problem:
        raise UserError(f"the schema is not supported: {str(problem)[:100]}") from problem


def call_grammar(tools: Sequence[dict[str, Any]]) -> str:
    """Return the grammar of one call of one of these tools, in the tags of MiniMind and Qwen.

    Args:
        tools: definitions in OpenAI's form.
    """
    variants = []
    for tool in tools:
        function = tool["function"]
        arguments = function.get("parameters") or {"type": "object"}
        properties = {"name": {"const": function["name"]}, "arguments": arguments}
        variants.append({"type": "object", "properties": properties, "required": ["name", "arguments"],
                         "additionalProperties": False})  # fmt: skip
    return json_grammar({"anyOf": variants} if len(variants) > 1 else variants[0])


class Grammar:
    """Tracks the grammar of one answer.

    Args:
        text: the grammar, from this module's functions.
        tokenizer: a transformers tokenizer.
        stop: ids that end an answer.
        before: ids before the grammar's text, such as those of a tool call's tag.
        behind: ids after the grammar's text.
        thinking: the answer starts inside a thought, in which any text is allowed.

    Raises:
        UserError: llguidance is not installed, or does not support the grammar.
    """

    def __init__(
        self,
        text: str,
        tokenizer: Any,
        stop: Sequence[int],
        before: Sequence[int] = (),
        behind: Sequence[int] = (),
        thinking: bool = False,
    ) -> None:
        from llguidance import LLMatcher  # pyright: ignore[reportMissingImports]

        self._tokenizer, self._stop, self._thinking = tokenizer, list(stop), thinking
        self._forced, self._behind = list(before), list(behind)
        self._seen: list[int] = []
        self._matcher = LLMatcher(_vocabulary(tokenizer, tuple(stop)), text, log_level=0)
        if problem := self._matcher.get_error():
            raise UserError(f"the schema is not supported: {problem.splitlines()[0][:300]}")

    def copy(self) -> Grammar:
        """Return a grammar in the same state for another answer, without compiling the text again."""
        other = copy.copy(self)
        other._forced, other._behind = list(self._forced), list(self._behind)
        other._matcher = self._matcher.deep_copy()
        return other

    def accept(self, token: int) -> None:
        """Advance by a token."""
        if self._thinking:
            self._seen = [*self._seen, token][-16:]
            self._thinking = TAGS["thinking"][1] not in self._tokenizer.backend_tokenizer.decode(self._seen)
        elif self._forced:
            self._forced.pop(0)
        elif not self._matcher.is_stopped():
            self._matcher.consume_token(token)

    def mask(self, logits: Tensor) -> None:
        """Set the logits [vocabulary] of forbidden tokens to minus infinity."""
        if self._thinking:
            logits[self._stop] = float("-inf")  # the answer follows the thought
            return
        allowed = self._forced[:1]
        if not allowed:
            if not self._done():
                bits = np.unpackbits(np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8), bitorder="little")
                hidden = torch.from_numpy(bits[: len(logits)] == 0)
                if len(hidden) < len(logits):
                    hidden = torch.cat((hidden, torch.ones(len(logits) - len(hidden), dtype=torch.bool)))
                logits.masked_fill_(hidden.to(logits.device), float("-inf"))
                return
            self._forced, self._behind = self._behind, []
            allowed = self._forced[:1] or self._stop
        kept = logits[allowed].clone()
        logits.fill_(float("-inf"))
        logits[allowed] = kept

    def _done(self) -> bool:
        """Return whether the grammar's text is complete."""
        # Ids after the text start as early as possible: otherwise the grammar would allow the answer to end.
        return bool(self._matcher.is_stopped() or (self._behind and self._matcher.is_accepting()))
