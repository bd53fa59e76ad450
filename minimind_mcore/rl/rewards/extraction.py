"""Extract the answer from a response, and normalize it so that different spellings compare equal.

The rules are those of MindSpeed-RL's `acc`, which come from the evaluations of Qwen2.5-Math and the MATH data set.
Their oddities are kept, so that the score does not depend on the backend.
"""

from __future__ import annotations

import re

from word2number import w2n

_NUMBER = re.compile(r"-?\d*\.?\d+")
# Units and other words next to a number, which are removed: in this order, then again with a plural s.
_UNITS = """
east|degree|mph|kmph|ft|m sqaure| m east|sq m|deg|mile|q .|monkey|prime|ratio|profit of rs|rd|o|gm|p . m|lb|
tile|per|dm|lt|gain|ab|way|west|a .|b .|c .|d .|e .|f .|g .|h .|t|a|h|no change|men|soldier|pie|bc|excess|st|
inches|noon|percent|by|gal|kmh|c|acre|rise|a . m|th|π r 2|sq|mark|l|toy|coin|sq . m|gallon|° f|profit|minw|yr|
women|feet|am|pm|hr|cu cm|square|v â € ™|are|rupee|rounds|cubic|cc|mtr|s|ohm|number|kmph|day|hour|minute|min|
second|man|woman|sec|cube|mt|sq inch|mp|∏ cm ³|hectare|more|sec|unit|cu . m|cm 2|rs .|rs|kg|g|month|km|m|cm|mm|
apple|liter|loss|yard|pure|year|increase|decrease|d|less|Surface|litre|pi sq m|s .|metre|meter|inch
""".replace("\n", "").split("|")
_UNIT_PATTERNS = [re.compile(rf"(^|\W){unit}($|\W)") for unit in [*_UNITS, *(f"{unit}s" for unit in _UNITS)]]
_SPELLINGS = {
    "bmatrix": "pmatrix", "tfrac": "frac", "dfrac": "frac", "\\neq": "\\ne", "\\leq": "\\le", "\\geq": "\\ge",
    "\\left": "", "\\right": "", "\\{": "{", "\\}": "}",
}  # fmt: skip
_SIGNS = {"^{\\circ}": "", "^\\circ": "", "\\$": "", "$": "", "\\(": "", "\\)": ""}
_SETS = {
    "x=": "", "y=": "", "z=": "", "x\\in": "", "y\\in": "", "z\\in": "", "x\\to": "", "y\\to": "", "z\\to": "",
    "\\emptyset": "{}", "(-\\infty,\\infty)": "\\mathbb{R}", "\\%": "", "%": "", " .": " 0.", "{.": "{0.",
    "infinity": "\\infty",
}  # fmt: skip


def extract(response: str) -> str:
    """Return the normalized answer: after "final answer is $", in the last box, after "the answer is" (or 答案是), or
    the last number. "" if the response has none."""
    answer = re.sub(r"\n\s*", "", _locate(response.replace("ки", "")))
    answer = answer.removeprefix(":").removesuffix(".").removesuffix("/")
    return tidy(answer)


def _locate(response: str) -> str:
    if "final answer is $" in response and "$. I hope" in response:
        return response.split("final answer is $", 1)[1].split("$. I hope", 1)[0].strip()
    if "boxed" in response:
        return _box(response.rsplit("boxed", 1)[1])
    if "he answer is" in response:
        return response.rsplit("he answer is", 1)[1].strip()
    if "final answer is" in response:
        return response.rsplit("final answer is", 1)[1].strip()
    if "答案是" in response:
        return response.split("答案是")[1].strip().split("\n\n")[0].strip()
    numbers = _NUMBER.findall(response.replace(",", ""))
    return numbers[-1] if numbers else ""


def _box(text: str) -> str:
    """Return the content of a box. `text` begins after "boxed".

    With braces the content ends at the closing brace or, without one, at the end of the text. Without braces it ends at
    the next dollar sign.
    """
    if not text.startswith("{"):
        return text.split("$")[0].strip()
    depth = 0
    for place, char in enumerate(text):
        depth += {"{": 1, "}": -1}.get(char, 0)
        if depth == 0:
            return text[1:place]
    return text[1:]


def tidy(answer: str) -> str:
    """Normalize an answer: remove units, \\left and dollar signs, and write words as numbers."""
    text = answer.strip().replace("\n", "").rstrip(".").replace("\\!", "")
    text = re.sub(r"\\begin\{array\}\{.*?\}", r"\\begin{pmatrix}", text)
    text = _replace(re.sub(r"\\end\{array\}", r"\\end{pmatrix}", text), _SPELLINGS)
    text = re.sub(r"\\text{.*?}$", "", text).strip() or text
    text = _replace(_without_units(text), _SIGNS)
    text = re.sub(r"\\text\{(.*?)\}", r"\1", _as_number(text))
    text = _replace(text, _SETS)
    if "\\infty" not in text:
        text = text.replace("inf", "\\infty")
    text = re.sub(r"\\mbox{.*?}", "", text.replace("and", "").replace("\\mathbf", ""))
    if "j" in text and "i" not in text:
        text = text.replace("j", "i")
    text = re.sub(r"(\d+)\.0*([^\d])", r"\1\2", text)
    text = re.sub(r"(\d+)\.0*$", r"\1", text)
    if text.startswith("."):
        text = "0" + text
    sides = text.split("=")
    if len(sides) == 2 and len(sides[0]) <= 2:
        text = sides[1]
    text = re.sub(r"\\sqrt(\w+)", r"\\sqrt{\1}", text).replace(" ", "")
    return answer if _cut_fraction(text) else _slash(text)


def _replace(text: str, table: dict[str, str]) -> str:
    for before, after in table.items():
        text = text.replace(before, after)
    return text


def _without_units(text: str) -> str:
    if not any(map(str.isalpha, text)):
        return text  # every unit has a letter; most answers have none
    for _ in range(2):
        for pattern in _UNIT_PATTERNS:
            text = pattern.sub(r"\1\2", text) or text
    return text


def _as_number(text: str) -> str:
    """Write a number in words as digits: "twenty one" becomes "21". Other text is returned as it is."""
    try:
        return str(w2n.word_to_num(text))
    except ValueError:
        return text


def _cut_fraction(text: str) -> bool:
    """Return whether fewer than 2 characters follow the first \\frac without braces. `tidy` keeps such an answer."""
    bare = [rest for rest in text.split("\\frac")[1:] if not rest.startswith("{")]
    return bool(bare) and len(bare[0]) < 2


def _slash(text: str) -> str:
    """Rewrite a fraction of integers a/b as MindSpeed-RL does. An escape there removes the backslash and the f of
    "\\frac", so `acc` always judges 1/2 as wrong, whatever the label."""
    parts = text.split("/")
    if len(parts) != 2:
        return text
    try:
        top, bottom = (part if "sqrt" in part else str(int(part)) for part in parts)
    except ValueError:
        return text
    return "\frac{" + top + "}{" + bottom + "}" if text == f"{top}/{bottom}" else text
