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
from dataclasses import dataclass, replace
from pathlib import Path

from minimind_mcore.errors import UserError
from minimind_mcore.preprocess.check import datasets_at, quick_check
from minimind_mcore.preprocess.convert import convert, preview
from minimind_mcore.preprocess.handlers import ChatHandler
from minimind_mcore.preprocess.indexed import read_index
from minimind_mcore.preprocess.options import Options
from minimind_mcore.preprocess.tokenize import tokenizer_info


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


def prepare_blend(blend: Blend, options: Options, dry_run: bool) -> list[str]:
    """Convert the raw datasets of a blend, and check the others.

    Args:
        blend: converted datasets or raw files.
        options: options of the conversion. Input and output prefix are replaced for each dataset.
        dry_run: convert nothing.

    Returns:
        The words of --data-path with weights. Empty if a dry run leaves datasets unconverted.

    Raises:
        UserError: a dataset does not exist, cannot be converted, or has another tokenizer.
    """
    if isinstance(options.find_handler(), ChatHandler):
        raise UserError(
            f"--input {options.input}: a blend is for pretraining data; of conversations give one set, whose files may "
            "be separated by commas"
        )
    if options.output_prefix is not None:
        raise UserError("--output-prefix names one dataset, and the input is a blend of several; use --cache-dir")
    info = tokenizer_info(options.tokenizer)
    prefixes, pending = [], False
    for path in blend.prefixes:
        place = Path(path).expanduser().absolute()
        found = [str(place)] if datasets_at(place) else []
        for prefix in found:
            quick_check(prefix, info.fingerprint, info.vocab_size)
        if not found:
            raw = replace(options, input=path)
            found = preview(raw) if dry_run else convert(raw)
            pending |= not found
        if blend.weights is not None and len(found) > 1:
            raise UserError(f"--input: {path} becomes {len(found)} datasets (--json-keys), and has one weight")
        prefixes += found
    if pending:
        return []
    return Blend(prefixes, blend.weights or [str(size) for size in sizes(prefixes)]).words
