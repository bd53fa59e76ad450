"""The fixed prompt of MindSpeed-LLM's first instruction handlers; it has no use for --prompt-type.

The loss is on what follows the last "### Response:", the answer itself: earlier answers are context. Where it
begins is counted in the ids of the text before it, encoded by itself, as MindSpeed-LLM counts.
"""

from __future__ import annotations

from collections.abc import Sequence

from minimind_mcore.preprocess.chat import IGNORED, Ids, Turns
from minimind_mcore.preprocess.messages import Conversation

USER, ASSISTANT = "### Instruction:", "### Response:"
HEAD = (
    "\nBelow is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request. "
    "Please note that you need to think through your response logically and step by step.\n"
)


class Prompter:
    """A `ChatTemplate`."""

    unwritten = frozenset[str]()

    def render(self, conversation: Conversation, thinking: bool | None = None) -> Turns:
        """See `ChatTemplate`: the whole text, and once more what comes before the last answer."""
        text = HEAD
        for message in conversation.messages:
            text += f"{USER if message['role'] == 'user' else ASSISTANT}\n{message['content']}\n"
        return [[text], [text.rpartition(ASSISTANT)[0] + ASSISTANT + "\n"]]

    def label(self, turns: Sequence[Ids], learned: Sequence[bool] = ()) -> tuple[Ids, Ids, bool]:
        """See `ChatTemplate`."""
        ids, asked = turns
        labels = ids.copy()
        labels[: len(asked)] = IGNORED
        return ids, labels, False
