"""Quality measures for the replies of any model: repetition, and whether replies end."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from tqdm import tqdm

from minimind_mcore.inference.generation import Generator
from minimind_mcore.inference.loading import Loaded
from minimind_mcore.inference.prompts import Prompt, PromptEncoder
from minimind_mcore.inference.sampling import SamplingParams

NGRAM = 4


def repetition(tokens: Sequence[Hashable], n: int = NGRAM) -> float:
    """Return the share of n-grams that occurred before in the same reply: seq-rep-n of arXiv:1908.04319."""
    grams = [tuple(tokens[start : start + n]) for start in range(len(tokens) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


@dataclass
class Quality:
    """Sums over replies.

    Attributes:
        replies: number of replies.
        repeated: sum of their repetition rates.
        ended: number of replies that ended before the limit of new tokens.
        tokens: number of tokens of all replies.
        counted: the tokens of all replies are known. A server may not return them.
    """

    replies: int = 0
    repeated: float = 0.0
    ended: int = 0
    tokens: int = 0
    counted: bool = True

    def add(self, tokens: Sequence[Hashable] | None, finished: bool) -> None:
        """Add a reply. `tokens` has no end token. None: the tokens are unknown."""
        self.replies += 1
        self.ended += finished
        self.counted &= tokens is not None
        self.repeated += repetition(tokens or ())
        self.tokens += len(tokens or ())

    def row(self) -> dict[str, float]:
        """Return means over the replies, for scores.json. Metrics of tokens are left out unless `counted`."""
        count = max(self.replies, 1)
        row = {"replies": self.replies, "ended": self.ended / count}
        if not self.counted:
            return row
        return row | {f"repetition_{NGRAM}gram": self.repeated / count, "tokens_per_reply": self.tokens / count}


def measure(loaded: Loaded, prompts: Sequence[Prompt], max_new_tokens: int, batch: int, raw: bool) -> Quality:
    """Generate replies to prompts, and measure them."""
    generator, encoder, quality = (
        Generator(loaded, SamplingParams(temperature=0), max_new_tokens),
        PromptEncoder(loaded.tokenizer, raw),
        Quality(),
    )
    with tqdm(total=len(prompts), desc="quality", unit="prompt", disable=None) as bar:
        for first in range(0, len(prompts), batch):
            for completion in generator.complete([encoder(prompt) for prompt in prompts[first : first + batch]]):
                quality.add(completion.ids, completion.finished)
            bar.update(len(prompts[first : first + batch]))
    return quality
