"""Rewards of format instead of correctness: MiniMind's rules for chat and reasoning."""

from __future__ import annotations

import re

_REASONED = re.compile(r"<think>\n.*?\n</think>\n\n?<answer>\n.*?\n</answer>", re.DOTALL)
_TAGS = ("<think>", "</think>", "<answer>", "</answer>")


def minimind_shape(response: str) -> float:
    """Return MiniMind's rule-based reward for GRPO, PPO and CISPO (trainer/train_grpo.py), without the reward model.

    +0.5 for a response of 20 to 800 characters, else -0.5. If the response has `</think>`: +1 for a thought of 20 to
    300 characters, else -0.5, and +0.25 for exactly one `</think>`, else -0.25. Minus `repetition` of the answer, 0 to
    0.5.
    """
    score = 0.5 if 20 <= len(response.strip()) <= 800 else -0.5
    thought, end, answer = response.partition("</think>")
    if end:
        score += 1.0 if 20 <= len(thought.strip()) <= 300 else -0.5
        score += 0.25 if response.count("</think>") == 1 else -0.25
    return score - repetition(answer.strip() if end else response)


def repetition(text: str, n: int = 3, cap: float = 0.5) -> float:
    """Return the share of repeated word n-grams times 2 * cap, at most `cap`."""
    words = re.findall(r"\w+|[^\w\s]", text.lower())
    grams = list(zip(*(words[start:] for start in range(n)), strict=False))
    return min(cap, (len(grams) - len(set(grams))) / len(grams) * 2 * cap) if grams else 0.0


def minimind_reason(response: str) -> float:
    """Return MiniMind-Ascend's reasoning reward: +0.5 for its format, a line per tag; +0.25 for each tag used once."""
    layout = 0.5 if _REASONED.fullmatch(response) else 0.0
    return layout + sum(0.25 for tag in _TAGS if response.count(tag) == 1)
