"""The sample corpus: pretraining text that exists on every machine with Python.

    python -m minimind_mcore.preprocess.corpus --output data/sample.jsonl --seed 42
    python -m minimind_mcore.preprocess.corpus --kind sft --output data/dialogues.jsonl     # see `dialogues`
    python -m minimind_mcore.preprocess.corpus --kind drills --output data/drills.jsonl     # see `drills`

The corpus has two parts, shuffled together. The first is real prose: the docstrings of Python's standard library and
the language documentation of `help()`. The second is generated: arithmetic word problems in Chinese and English, which
a very small model can learn visibly. The same Python version and seed give the same bytes.
"""

from __future__ import annotations

import ast
import functools
import inspect
import logging
import random
import sysconfig
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from minimind_mcore.errors import UserError, run
from minimind_mcore.inputs.flags import documented_parser
from minimind_mcore.preprocess.dialogues import SUMMANDS, TEXTS, dialogues, drills, held_out, preferences, thoughts
from minimind_mcore.preprocess.math_problems import careless, unseen_problems
from minimind_mcore.preprocess.math_problems import problems as math_problems
from minimind_mcore.preprocess.tool_dialogues import dialogues as tool_dialogues
from minimind_mcore.preprocess.tool_dialogues import held_out as unseen_tool_questions
from minimind_mcore.preprocess.tool_dialogues import numbers_in
from minimind_mcore.storage import write_json_lines

logger = logging.getLogger("minimind_mcore.preprocess.corpus")

# Not prose: test suites, vendored code, tables, and pip, which is not always installed.
SKIPPED = {"test", "tests", "idle_test", "site-packages", "dist-packages", "ensurepip", "encodings", "__pycache__"}
SHORTEST = 80
TOTAL_BYTES = 4_000_000
LEAST_PROBLEMS = 1_000_000


def stdlib_prose() -> list[str]:
    """Return the docstrings of the standard library and pydoc's topics, sorted and without duplicates."""
    root = Path(sysconfig.get_paths()["stdlib"])
    texts = set(_topics())
    for file in root.rglob("*.py"):
        if not SKIPPED.intersection(file.relative_to(root).parts):
            texts.update(_docstrings(file))
    whole = {text.encode("utf-8", "ignore").decode("utf-8") for text in texts}  # a docstring may hold a lone surrogate
    return sorted(text for text in whole if len(text) >= SHORTEST)


def _topics() -> Iterator[str]:
    from pydoc_data import topics  # type: ignore[attr-defined, unused-ignore]

    for text in topics.topics.values():
        yield text.strip()


def _docstrings(file: Path) -> Iterator[str]:
    """Yield a module's docstring, and each class with its methods as one text."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # old modules hold invalid escapes
            module = ast.parse(file.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError):  # lib2to3 and others contain files with invalid source
        return
    for node in (module, *module.body):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            parts = [_described(node)]
            if isinstance(node, ast.ClassDef):
                parts += [_described(f) for f in node.body if isinstance(f, ast.FunctionDef | ast.AsyncFunctionDef)]
            text = "\n\n".join(part for part in parts if part)
            if text:
                yield text


def _described(node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    docstring = inspect.cleandoc(ast.get_docstring(node) or "")
    if not docstring or isinstance(node, ast.Module):
        return docstring
    signature = f"({ast.unparse(node.args)})" if not isinstance(node, ast.ClassDef) else ""
    return f"{node.name}{signature}\n{docstring}"


HELD_OUT = frozenset(SUMMANDS[1])


def _summands(r: random.Random, largest: int) -> tuple[int, int]:
    """Return two numbers whose sum is not held out."""
    while (pair := (r.randint(1, largest), r.randint(1, largest))) in HELD_OUT:
        pass
    return pair


def _sum(largest: int, r: random.Random) -> dict[str, object]:
    (a, b), (zh, en), i = _summands(r, largest), r.choice(TEXTS["things"]), r.randrange(6)
    names = {"name": TEXTS["names"][0][i], "other": TEXTS["names"][1][i]}
    return {"a": a, "b": b, "whole": a + b, "zh": zh, "en": en, **names}


def _product(r: random.Random) -> dict[str, object]:
    a, b, (zh, en) = r.randint(2, 12), r.randint(2, 30), r.choice(TEXTS["things"])
    return {"a": a, "b": b, "whole": a * b, "zh": zh, "en": en}


def _cages(r: random.Random) -> dict[str, object]:
    rabbits, chickens = r.randint(1, 20), r.randint(1, 20)
    heads, feet = rabbits + chickens, 4 * rabbits + 2 * chickens
    return {"rabbits": rabbits, "chickens": chickens, "heads": heads, "feet": feet}


def _trip(r: random.Random) -> dict[str, object]:
    speed, hours = r.randint(4, 90), r.randint(2, 9)
    return {"speed": speed, "hours": hours, "way": speed * hours}


# The numbers of each kind of problem; sample_texts.json has the words. A subtraction starts with the sum.
PROBLEMS: tuple[tuple[str, Callable[[random.Random], dict[str, object]]], ...] = (
    ("addition", functools.partial(_sum, 99)), ("subtraction", functools.partial(_sum, 49)),
    ("product", _product), ("share", _product), ("cages", _cages), ("trip", _trip),
)  # fmt: skip


def _problem(r: random.Random, language: int) -> str:
    name, numbers = r.choice(PROBLEMS)
    text: str = TEXTS["problems"][name][language]
    return text.format(**numbers(r))


def problems(seed: int, size: int) -> list[str]:
    """Generate word problems, a few per text, about half of them in Chinese.

    Args:
        seed: seed of the generator.
        size: minimum of UTF-8 bytes, exceeded by less than one text.
    """
    generator = random.Random(seed)
    texts, total = [], 0
    while total < size:
        language = generator.randrange(2)
        chosen = [_problem(generator, language) for _ in range(generator.randint(2, 6))]
        texts.append("\n\n".join(chosen))
        total += len(texts[-1].encode())
    return texts


def build(seed: int) -> list[str]:
    """Build the corpus: the prose, filled up to `TOTAL_BYTES` with problems."""
    prose = stdlib_prose()
    size = sum(len(text.encode()) for text in prose)
    texts = prose + problems(seed, max(LEAST_PROBLEMS, TOTAL_BYTES - size))
    random.Random(seed).shuffle(texts)
    return texts


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = documented_parser("minimind-mcore corpus", __doc__)
    parser.add_argument("--output", required=True, help="the .jsonl file to write")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument(
        "--kind",
        choices=("text", "drills", "sft", "dpo", "reason", "math", "math-sft", "tools"),
        default="text",
        help="text for pretraining, only sums and tables, dialogues for fine-tuning, preferences between two answers, "
        "sums with thoughts, "
        "math problems for reinforcement learning, dialogues that solve such, dialogues with tool calls",
    )
    parser.add_argument("--held-out", metavar="JSONL", help="with --kind sft, math or tools: unseen questions")
    args = parser.parse_args(argv)
    unseen: dict[str, Callable[[int], list[dict[str, Any]]]] = {
        "sft": held_out,
        "math": unseen_problems,
        "tools": lambda seed: unseen_tool_questions(seed, read=numbers_in(build(seed))),
    }
    if args.held_out and args.kind not in unseen:
        raise UserError(f"--held-out: --kind {args.kind} has nothing to hold out; it goes with {' or '.join(unseen)}")
    makers: dict[str, Callable[[int], list[dict[str, Any]]]] = {
        "text": lambda seed: [{"text": text} for text in build(seed)],
        "drills": lambda seed: [{"text": text} for text in drills(seed)],
        "sft": dialogues,
        "dpo": preferences,
        "reason": thoughts,
        "math": math_problems,
        "math-sft": careless,
        "tools": tool_dialogues,
    }
    _write(args.output, makers[args.kind](args.seed))
    if args.held_out:
        _write(args.held_out, unseen[args.kind](args.seed))


def _write(path: str, records: Sequence[dict[str, Any]]) -> None:
    write_json_lines(path, records)
    logger.info(f"{path}: {len(records):,} records, {Path(path).stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    run(main)
