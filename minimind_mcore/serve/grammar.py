"""Text that must follow a grammar: the JSON of `response_format`, and tool calls that `tool_choice` asks for.

llguidance says which tokens may come next. A grammar may begin behind a thought, and end the answer.
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
    """llguidance's tokenizer; it takes a second to make."""
    from llguidance.hf import from_tokenizer  # pyright: ignore[reportMissingImports]

    return from_tokenizer(tokenizer, eos_token=list(stop))


def json_grammar(schema: dict[str, Any] | None) -> str:
    """The grammar of a JSON schema; None: of any JSON object.

    Raises:
        UserError: the schema is not a text of Unicode.
    """
    from llguidance import LLMatcher  # pyright: ignore[reportMissingImports]

    # The separators of the template's tojson, which the model was trained on.
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
    """The grammar of one call of one of these tools, in MiniMind's and Qwen's tags.

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
    """Follows one answer.

    Args:
        text: the grammar, of this module's functions.
        tokenizer: of transformers.
        stop: ids that end an answer.
        before: ids that come first, such as those of a tool call's tag.
        behind: ids that come last.
        thinking: the answer begins inside of a thought, in which anything may stand.

    Raises:
        UserError: llguidance is not installed, or does not understand the grammar.
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
        """Return a grammar at the same place for another answer, which need not compile the text again."""
        other = copy.copy(self)
        other._forced, other._behind = list(self._forced), list(self._behind)
        other._matcher = self._matcher.deep_copy()
        return other

    def accept(self, token: int) -> None:
        """Go on behind a token."""
        if self._thinking:
            self._seen = [*self._seen, token][-16:]
            self._thinking = TAGS["thinking"][1] not in self._tokenizer.backend_tokenizer.decode(self._seen)
        elif self._forced:
            self._forced.pop(0)
        elif not self._matcher.is_stopped():
            self._matcher.consume_token(token)

    def mask(self, logits: Tensor) -> None:
        """Set the logits [vocabulary] of tokens that may not come next to minus infinity."""
        if self._thinking:
            logits[self._stop] = float("-inf")  # the answer is still to come
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
        """Whether the grammar's text is whole."""
        # Where something comes behind it, that begins as soon as it can: the grammar would allow an end of the answer.
        return bool(self._matcher.is_stopped() or (self._behind and self._matcher.is_accepting()))
