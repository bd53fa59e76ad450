"""MiniMind's random changes to a conversation, drawn from a seed and the conversation itself.

MiniMind draws anew each time it reads a record (dataset/lm_dataset.py): one conversation in five gets
a system prompt, and four of five texts with empty thoughts lose them, so that the model learns to
answer with them and without. Here they are drawn once, when the data is made; another seed gives
another draw. A draw depends on the seed and the conversation's content alone: not on the order, the
shards or the workers. (So copies of a conversation share one draw.)
"""

from __future__ import annotations

import hashlib
import json
import struct
from dataclasses import dataclass, replace

from minimind_mcore.preprocess.messages import Conversation

EMPTY_THINK = "<think>\n\n</think>\n\n"
SYSTEM_PROMPTS = (
    "你是一个知识丰富的AI，尽力为用户提供准确的信息。",
    "你是minimind，一个小巧但有用的语言模型。",
    "你是一个专业的AI助手，请提供有价值的回答。",
    "你是minimind，请尽力帮助用户解决问题。",
    "你是一个可靠的AI，请给出准确的回答。",
    "You are a helpful AI assistant.",
    "You are minimind, a lightweight intelligent assistant.",
    "You are a friendly chatbot. Please answer the user's questions carefully.",
    "You are a knowledgeable AI. Try your best to provide accurate information.",
    "You are minimind, a small but useful language model.",
)


@dataclass(frozen=True)
class Draw:
    """Independent numbers for one conversation, uniform in [0, 1)."""

    system: float
    prompt: float
    empty_think: float
    thinking: float


def draw(seed: int, conversation: Conversation) -> Draw:
    """The numbers that a seed gives a conversation."""
    content = json.dumps([seed, list(conversation.messages), conversation.tools], sort_keys=True)
    digest = hashlib.blake2b(content.encode(), digest_size=32).digest()
    return Draw(*((number >> 11) * 2.0**-53 for number in struct.unpack("<4Q", digest)))


def add_system_prompt(conversation: Conversation, drawn: Draw, ratio: float) -> Conversation:
    """Put one of MiniMind's system prompts first, with probability `ratio`, where there is none and no tools."""
    if conversation.tools or conversation.messages[0]["role"] == "system" or drawn.system >= ratio:
        return conversation
    message = {"role": "system", "content": SYSTEM_PROMPTS[int(drawn.prompt * len(SYSTEM_PROMPTS))]}
    return replace(conversation, messages=[message, *conversation.messages])


def drop_empty_thoughts(text: str, drawn: Draw, ratio: float) -> str:
    """Remove empty thought blocks, all of a text or none; they stay with probability `ratio`."""
    return text if drawn.empty_think < ratio else text.replace(EMPTY_THINK, "")
