"""Parse `--split`: the weights of training, validation and test.

Megatron-LM reads every run of digits and dots in the text and skips the rest, so it reads "90,abc5,5" as
90, 5, 5. Every program of this kit, including dry runs and recipes, uses this parser instead.
"""

from __future__ import annotations

import math
import re

from minimind_mcore.errors import UserError

# Numbers without sign and exponent, which Megatron-LM parses like this parser. MindSpeed-LLM uses Megatron-LM's parser.
_NUMBER = re.compile(r"\d+\.?\d*|\.\d+")
MEGATRON_DEFAULT = "969, 30, 1"


def parse_split(split: str, name: str = "--split") -> tuple[float, float, float]:
    """Return the shares of training, validation and test, which add up to 1.

    Args:
        split: one to three weights, separated by commas or slashes; missing ones are 0.
        name: the flag or key that holds `split`, for the error.

    Raises:
        UserError: another text, or only zeros.
    """
    words = [word.strip() for word in re.split("[,/]", split)]
    weights = [float(word) for word in words if _NUMBER.fullmatch(word)]
    if len(weights) < len(words) or len(words) > 3 or not 0 < sum(weights) < math.inf:
        raise UserError(f"{name} {split}: expected the weights of training, validation and test, such as 99,1,0")
    training, validation, test = (weight / sum(weights) for weight in [*weights, 0.0, 0.0][:3])
    return training, validation, test
