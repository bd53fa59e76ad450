"""DAPO's verifier: the text after the last "Answer:", normalized as in Minerva's evaluation (arXiv 2206.14858)."""

from __future__ import annotations

import re

_ANSWER = re.compile(r"(?i)Answer\s*:\s*([^\n]+)")
_SPELLINGS = [
    ("an ", ""), ("a ", ""), (".$", "$"), ("\\$", ""), ("\\ ", ""), (" ", ""), ("mbox", "text"),
    (",\\text{and}", ","), ("\\text{and}", ","), ("\\text{m}", "\\text{}"),
]  # fmt: skip
_REMOVED = [
    "square", "ways", "integers", "dollars", "mph", "inches", "hours", "km", "units", "\\ldots", "sue", "points",
    "feet", "minutes", "digits", "cents", "degrees", "cm", "gm", "pounds", "meters", "meals", "edges", "students",
    "childrentickets", "multiples", "\\text{s}", "\\text{.}", "\\text{\ns}", "\\text{}^2", "\\text{}^3",
    "\\text{\n}", "\\text{}", "\\mathrm{th}", "^\\circ", "^{\\circ}", "\\;", ",\\!", "{,}", '"', "\\dots",
]  # fmt: skip
_UNWRAPPED = [
    (r"(.*?)(\$)(.*?)(\$)(.*)", r"$\3$"),  # keep only the first formula
    (r"\\text\{(.*?)\}", r"\1"),
    (r"\\textbf\{(.*?)\}", r"\1"),
    (r"\\overline\{(.*?)\}", r"\1"),
    (r"\\boxed\{(.*)\}", r"\1"),
    (r"frac([^{])(.)", r"frac{\1}{\2}"),
    (r"sqrt([^{])", r"sqrt{\1}"),
]


def answered(response: str, label: str) -> bool:
    """Return whether the last "Answer: ..." in the last 300 characters of the response equals the label."""
    found = _ANSWER.findall(response[-300:])
    return normalise(found[-1] if found else "[INVALID]") == normalise(label)


def normalise(answer: str) -> str:
    """Return the text after the last "=", without units, words and formatting."""
    answer = answer.split("=")[-1]
    for before, after in [*_SPELLINGS, *((word, "") for word in _REMOVED)]:
        answer = answer.replace(before, after)
    for pattern, replacement in _UNWRAPPED:
        answer = re.sub(pattern, replacement, answer)
    answer = answer.replace("$", "")
    plain = answer.replace(",", "")
    return plain if plain.isdigit() else answer.strip()
