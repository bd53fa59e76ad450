"""Blends: several pretraining datasets, each read in proportion to its weight.

    blend = parse_blend(["0.3", "data/one", "0.7", "data/two"])     # the words of --data-path
        blend.weights or sizes(blend.prefixes)                          # without weights: in proportion to the tokens

Without weights megatron-core gives each dataset one pass and ends the run there, and raises a bare AssertionError for a
dataset with less than one sample. Here datasets without weights get their sizes as explicit weights, in every backend.
"""

from __future__ import annotations

import glob
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from minimind_mcore.errors import UserError
from minimind_mcore.preprocess.indexed import datasets_at, read_index


@dataclass(frozen=True)
class Blend:
    """Datasets with their weights as written. `weights` is None for datasets that are weighted by size."""

    prefixes: list[str]
    weights: list[str] | None

    @property
    def words(self) -> list[str]:
        """Return the words of --data-path: prefixes, each after its weight if there are weights."""
        if self.weights is None:
            return self.prefixes
        return [word for pair in zip(self.weights, self.prefixes, strict=True) for word in pair]


def number(word: str) -> float | None:
    """Return the number in a word, or None if the word is not a number."""
    try:
        return float(word)
    except ValueError:
        return None


def _exists(path: str) -> bool:
    """Return whether a path names a converted dataset or raw files."""
    expanded = Path(path).expanduser()
    return expanded.exists() or bool(datasets_at(expanded)) or bool(glob.glob(str(expanded)))


def parse_blend(words: Sequence[str], flag: str = "--data-path") -> Blend:
    """Parse prefixes, or pairs of a weight and a prefix.

    Args:
        words: words of `flag`.
        flag: name of the flag, for messages.

    Raises:
        UserError: only some datasets have weights, or a weight is not a positive number.
    """
    words = [word.strip() for word in words]
    if not words:
        return Blend([], None)
    weights, prefixes = words[::2], words[1::2]
    if len(words) % 2 or any(number(word) is None for word in weights):
        numbers = [word for word in words if number(word) is not None and not _exists(word)]
        if not numbers:
            return Blend(words, None)
        raise UserError(
            f"{flag} {' '.join(words)}: found weights ({', '.join(numbers)}) for some sets only; expected a weight "
            "before each set, such as 0.3 one 0.7 two, or none"
        )
    for weight, prefix in zip(weights, prefixes, strict=True):
        value = number(weight)
        if value is None or not 0 < value < math.inf:
            raise UserError(
                f"{flag}: the weight of {prefix} is {weight}; expected a number above 0. Leave the set out to read "
                "none of it"
            )
    return Blend(prefixes, weights)


def sizes(prefixes: Sequence[str]) -> list[int]:
    """Return the number of tokens of each dataset."""
    return [int(read_index(prefix).lengths.sum(dtype="int64")) for prefix in prefixes]


def blend_of_text(text: str, flag: str) -> Blend | None:
    """Parse a text such as "0.3 one 0.7 two" to a blend. None for a single path, which may contain white space.

    Raises:
        UserError: see `parse_blend`.
    """
    words = text.split()
    if len(words) < 2 or _exists(text) or not (number(words[0]) is not None or _exists(words[0])):
        return None
    return parse_blend(words, flag)
