"""Multiple-choice benchmarks from local files, in their published formats.

| benchmark | original files | files on the Hugging Face Hub |
|---|---|---|
| C-Eval | `dev/SUBJECT_dev.csv`, `val/SUBJECT_val.csv` | `SUBJECT/dev-*.parquet`, `SUBJECT/val-*.parquet` |
| CMMLU | `dev/SUBJECT.csv`, `test/SUBJECT.csv` | `SUBJECT/dev-*.parquet`, `SUBJECT/test-*.parquet` |
| MMLU | `dev/SUBJECT_dev.csv`, `test/SUBJECT_test.csv`, no header | `SUBJECT/dev-*.parquet`, `SUBJECT/test-*.parquet` |
| OpenBookQA | `Main/train.jsonl`, `Main/test.jsonl` | `main/train-*.parquet`, `main/test-*.parquet` |

Questions have the text of lm-evaluation-harness, except that subjects of C-Eval and CMMLU keep their English names. The
scored text is the letter after "Answer:" or the Chinese equivalent. For OpenBookQA it is the text of the choice.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minimind_mcore.errors import UserError
from minimind_mcore.preprocess.readers import sound_records

LETTERS = "ABCD"
SUFFIXES = (".csv", ".parquet", ".jsonl")
REPEATED = ("all", "additional")  # folders of MMLU and OpenBookQA on the Hub that repeat the questions of other folders


@dataclass(frozen=True)
class ChoiceQuestion:
    """A question, its choices, and the index of the right one."""

    text: str
    choices: tuple[str, ...]
    answer: int


@dataclass(frozen=True)
class Subject:
    """The questions of a subject, and solved questions for the prompt (`shots`)."""

    name: str
    questions: list[ChoiceQuestion]
    shots: list[ChoiceQuestion]


@dataclass(frozen=True)
class Benchmark:
    """How a benchmark is stored, and the text of its prompts.

    Attributes:
        splits: name of the split with the questions, and of the split with the shots.
        read: makes a question from a record.
        introduction: first text of the prompt. {subject} is the name of the subject.
        answer_word: text before the answer. None if the texts of the choices are scored.
        header: column names for CSV files without a header.
    """

    splits: tuple[str, str]
    read: Callable[[Mapping[str, Any]], ChoiceQuestion]
    introduction: str = ""
    answer_word: str | None = None
    header: tuple[str, ...] | None = None

    def context(self, question: ChoiceQuestion) -> str:
        """Return the text of a question in the prompt."""
        if self.answer_word is None:
            return question.text
        choices = "".join(f"\n{letter}. {text}" for letter, text in zip(LETTERS, question.choices, strict=True))
        return f"{question.text.strip()}{choices}\n{self.answer_word}"

    def continuations(self, question: ChoiceQuestion) -> list[str]:
        """Return the continuations to score: the letters, or the texts."""
        texts = question.choices if self.answer_word is None else LETTERS[: len(question.choices)]
        return [f" {text}" for text in texts]

    def prompt(self, subject: Subject, question: ChoiceQuestion, shots: int) -> str:
        """Return introduction, `shots` solved questions, and the question."""
        shown = [self.context(s) + self.continuations(s)[s.answer] + "\n\n" for s in subject.shots[:shots]]
        introduction = self.introduction.format(subject=subject.name.replace("_", " "))
        return introduction + "".join(shown) + self.context(question)


def _lettered(record: Mapping[str, Any]) -> ChoiceQuestion:
    """Read a row of C-Eval, CMMLU or MMLU: columns A to D in either case, or `choices` and a number."""
    row = {str(key).lower(): value for key, value in record.items()}
    text = row["question"]
    if "choices" in row:
        choices, answer = tuple(row["choices"]), int(row["answer"])
    else:
        choices, letter = tuple(row[letter] for letter in "abcd"), str(row["answer"]).strip()
        if letter not in tuple(LETTERS):  # a tuple, because "" and "BC" are substrings of the string
            raise ValueError(f"answer {letter!r}, expected one of {', '.join(LETTERS)}")
        answer = LETTERS.index(letter)
    if len(choices) != len(LETTERS) or not 0 <= answer < len(LETTERS):
        raise ValueError(f"{len(choices)} choices, answer {answer}")
    return ChoiceQuestion(str(text), tuple(map(str, choices)), answer)


def _openbook(record: Mapping[str, Any]) -> ChoiceQuestion:
    """Read a row of OpenBookQA. The question and its choices may be in a nested object."""
    inner = record["question"] if isinstance(record.get("question"), Mapping) else record
    choices = inner["choices"]
    if isinstance(choices, Mapping):
        texts, labels = choices["text"], choices["label"]
    else:
        texts, labels = [c["text"] for c in choices], [c["label"] for c in choices]
    stem = inner["stem"] if "stem" in inner else inner["question_stem"]
    return ChoiceQuestion(str(stem), tuple(map(str, texts)), list(labels).index(str(record["answerKey"]).strip()))


BENCHMARKS = {
    "ceval": Benchmark(
        ("val", "dev"), _lettered, "以下是中国关于{subject}的单项选择题，请选出其中的正确答案。\n\n", "答案："
    ),
    "cmmlu": Benchmark(
        ("test", "dev"), _lettered, "以下是关于{subject}的单项选择题，请直接给出正确答案的选项。\n\n", "答案："
    ),
    "mmlu": Benchmark(
        ("test", "dev"),
        _lettered,
        "The following are multiple choice questions (with answers) about {subject}.\n\n",
        "Answer:",
        ("question", "A", "B", "C", "D", "answer"),
    ),
    "openbookqa": Benchmark(("test", "train"), _openbook),
}


def load_benchmark(name: str, path: Path, shots: int) -> list[Subject]:
    """Return the subjects of a benchmark, by name.

    Args:
        name: a key of `BENCHMARKS`.
        path: folder of the benchmark. The folder of the questions' split is also accepted, as in MindSpeed-LLM.
        shots: number of solved questions that each subject must have.

    Raises:
        UserError: a file is missing or empty, a row is not a question, or there are too few shots.
    """
    benchmark = BENCHMARKS[name]
    if not path.is_dir():
        raise UserError(f"--task-data-path {path}: no such directory; expected the files of {name}")
    split, shots_split = benchmark.splits
    root = path.parent if path.name == split else path
    files, solved = _files(root, split), _files(root, shots_split) if shots else {}
    if not files:
        raise UserError(
            f"--task-data-path {path}: found no {split} split of {name} there; expected {split}/SUBJECT.csv or "
            f"SUBJECT/{split}-*.parquet, as published (the table in inference/benchmarks.py)"
        )
    subjects = []
    for subject, sources in sorted(files.items()):
        known = [q for file in solved.get(subject, []) for q in _questions(file, benchmark)]
        if len(known) < shots:
            raise UserError(f"{name}, {subject}: --num-fewshot {shots}, but {shots_split} has {len(known)} questions")
        subjects.append(Subject(subject, [q for file in sources for q in _questions(file, benchmark)], known))
    return subjects


def _files(folder: Path, split: str) -> dict[str, list[Path]]:
    """Return the files of a split by subject: `val/X_val.csv`, `X/val-00000-of-00001.parquet`, `Main/test.jsonl`.

    Raises:
        UserError: a subject exists in two formats.
    """
    found: dict[str, list[Path]] = {}
    for file in sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES):
        if re.fullmatch(rf"{split}(-\d+-of-\d+)?", file.stem):
            subject = file.parent.name
        elif file.parent.name == split or file.stem.endswith(f"_{split}"):
            subject = file.stem.removesuffix(f"_{split}")
        else:
            continue
        if subject.lower() not in REPEATED:
            found.setdefault(subject, []).append(file)
    for subject, files in found.items():
        if len({(file.parent, file.suffix) for file in files}) > 1:
            raise UserError(f"{folder}: {subject} exists more than once: {', '.join(map(str, files))}; keep one format")
    return found


def _questions(file: Path, benchmark: Benchmark) -> list[ChoiceQuestion]:
    """Return the questions of a file.

    Raises:
        UserError: the file is empty, or a row is not a question.
    """
    questions = []
    for where, record in _records(file, benchmark.header):
        try:
            questions.append(benchmark.read(record))
        except (KeyError, ValueError, TypeError, IndexError) as error:
            raise UserError(f"{where}: not a question of this benchmark ({error!r}); found {dict(record)}") from error
    if not questions:
        raise UserError(f"{file}: no questions in it")
    return questions


def _records(file: Path, header: Sequence[str] | None) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield each record of a file with its location, for messages."""
    if file.suffix.lower() == ".csv":
        yield from _rows(file, header)
        return
    keys = ("question", "question_stem", "choices", "answer", "answerKey", "id", *LETTERS, "Question", "Answer")
    for where, record in sound_records(str(file), keys):
        if not isinstance(record, dict):
            raise UserError(f"{where}: not a JSON object")
        yield where, record


def _rows(file: Path, header: Sequence[str] | None) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield the rows of a CSV file."""
    with open(file, encoding="utf-8-sig", newline="") as f:
        reader = csv.DictReader(f, header)
        try:
            for row in reader:
                where = f"{file}, line {reader.line_num}"
                if None in row or None in row.values():
                    raise UserError(f"{where}: expected {len(reader.fieldnames or ())} columns, found another number")
                yield where, row
        except UnicodeDecodeError as error:
            raise UserError(
                f"{file}: not in UTF-8 (after line {reader.line_num}: {error.reason}). Convert the file to "
                "UTF-8; for a file in GBK: iconv -f GBK -t UTF-8"
            ) from error
        except csv.Error as error:
            raise UserError(f"{file}, line {reader.line_num + 1}: not a readable CSV file ({error})") from error
