"""Results of an evaluation: a table, scores.json and scores.png, and the answers where some were written."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from minimind_mcore.errors import UserError
from minimind_mcore.inference.generation import Generator
from minimind_mcore.inference.loading import Loaded
from minimind_mcore.inference.prompts import Encoder, Prompt, records
from minimind_mcore.inference.quality import Quality
from minimind_mcore.inference.sampling import Sampling
from minimind_mcore.inference.scoring import Accuracy, Perplexity
from minimind_mcore.inference.toolcall import TOOLCALL, Outcome, summary
from minimind_mcore.storage import atomic_file, atomic_write_text

# Questions whose answer is one text: the model answers in the chat template, greedily, and every character counts.
# Files: {"conversations": [{"role": "user", "content": "17+25=?"}, ...], "answer": "17+25=42", "task": "addition"}.
# `messages` may stand for `conversations`; an answer of the assistant at the end is left out; without `task` all
# questions belong to one. `python -m minimind_mcore.preprocess.corpus --kind sft --held-out` makes such files.
LONGEST = 64  # tokens of a completion, or as many as the longest answer needs


@dataclass(frozen=True)
class Question:
    """A question with its only answer; `task` is its kind."""

    task: str
    prompt: Prompt
    answer: str


@dataclass(frozen=True)
class Answered:
    """A question and what the model said."""

    question: Question
    completion: str

    @property
    def right(self) -> bool:
        """White space around an answer does not count."""
        return self.completion.strip() == self.question.answer.strip()

    def row(self) -> dict[str, Any]:
        """For a file."""
        shown = {"task": self.question.task, "messages": self.question.prompt.messages}
        return {**shown, "answer": self.question.answer, "completion": self.completion, "right": self.right}


def read_questions(path: str) -> list[Question]:
    """The questions of a jsonl file.

    Raises:
        UserError: no such file, or a record without question or answer.
    """
    questions = []
    for where, record, prompt in records(path, used=("answer", "task")):
        answer, task = record.get("answer"), record.get("task", Path(path).stem)
        if not isinstance(answer, str) or not isinstance(task, str):
            raise UserError(f"{where}: expected an 'answer' that is a text, and a 'task' that is one or absent")
        questions.append(Question(task, prompt, answer))
    if not questions:
        raise UserError(f"{path}: no question there")
    return questions


def ask(loaded: Loaded, questions: Sequence[Question], batch_size: int, quality: Quality) -> list[Answered]:
    """Let the model answer all questions. `quality` counts the replies."""
    answers = loaded.tokenizer([question.answer for question in questions], add_special_tokens=False)["input_ids"]
    longest = max(LONGEST, *(len(ids) + 1 for ids in answers))  # one for the end
    generator, encoder = Generator(loaded, Sampling(temperature=0), longest), Encoder(loaded.tokenizer, raw=False)
    answered = []
    with tqdm(total=len(questions), desc="exact_match", unit="question", disable=None) as bar:
        for first in range(0, len(questions), batch_size):
            batch = questions[first : first + batch_size]
            completions = generator.complete([encoder(question.prompt) for question in batch])
            for question, completion in zip(batch, completions, strict=True):
                text = loaded.tokenizer.decode(completion.ids, skip_special_tokens=True)
                answered.append(Answered(question, text))
                quality.add(completion.ids, completion.finished)
            bar.update(len(batch))
    return answered


JSON, PICTURE, ANSWERS = "scores.json", "scores.png", "answers.jsonl"
CHANCE = 0.25  # of benchmarks
SHOWN = 3


@dataclass
class Scores:
    """What was found.

    Attributes:
        about: the model, the settings.
        accuracies: of each benchmark, by subject.
        answers: what the model said, of exact_match.
        perplexities: of each held-out text.
        harness: what lm-evaluation-harness says, by task.
        outcomes: of the cases with tools.
        quality: of the replies, by task.
    """

    about: dict[str, Any]
    accuracies: dict[str, dict[str, Accuracy]] = field(default_factory=dict)
    answers: list[Answered] = field(default_factory=list)
    perplexities: dict[str, Perplexity] = field(default_factory=dict)
    harness: dict[str, Any] = field(default_factory=dict)
    outcomes: list[Outcome] = field(default_factory=list)
    quality: dict[str, Quality] = field(default_factory=dict)

    def total(self, benchmark: str) -> Accuracy:
        """Of all questions of a benchmark, whatever their subject; of tool calls, the rate of exact ones."""
        if benchmark == TOOLCALL and "exact" in self.accuracies[benchmark]:
            return self.accuracies[benchmark]["exact"]
        first, *others = self.accuracies[benchmark].values()
        return sum(others, first)

    def add_answers(self, benchmark: str, answers: Sequence[Answered]) -> None:
        """Count the right ones of each task."""
        self.answers += answers
        tasks = self.accuracies.setdefault(benchmark, {})
        for answer in answers:
            task = answer.question.task
            tasks[task] = tasks.get(task, Accuracy(0, 0)) + Accuracy(1, int(answer.right))

    def add_outcomes(self, outcomes: Sequence[Outcome]) -> None:
        """Compute the rates of tool calls, for all cases and for each task."""
        self.outcomes += outcomes
        self.accuracies[TOOLCALL] = {
            name: Accuracy(total, right) for name, (right, total) in summary(self.outcomes).items()
        }

    def table(self) -> str:
        """Lines for people."""
        lines = []
        for name, subjects in self.accuracies.items():
            rows = {**subjects, **({"all": self.total(name)} if len(subjects) > 1 else {})}
            width = max(len("subject"), *map(len, rows))
            heads = f"{name:<12}{'subject':<{width}}{'questions':>11}{'accuracy':>10}{'± error':>9}"
            lines.append(heads + ("" if self.total(name).by_length is None else f"{'by length':>11}"))
            for subject, row in rows.items():
                error = "" if math.isnan(row.error) else f"{row.error:.2%}"
                lines.append(
                    f"{'':<12}{subject:<{width}}{row.questions:>11,}{row.value:>10.2%}{error:>9}"
                    + ("" if row.by_length is None else f"{row.by_length:>11.2%}")
                )
        lines += self._examples()
        for name, text in self.perplexities.items():
            lines.append(
                f"perplexity  {name}: {text.value:.4f} over {text.tokens:,} tokens; "
                f"{text.bits_per_byte:.4f} bits per byte over {text.bytes:,} bytes"
            )
        for name, replies in self.quality.items():
            values = ", ".join(f"{key} {value:,.4g}" for key, value in replies.row().items())
            lines.append(f"quality     {name}: {values}")
        lines += [f"harness     {task}: {json.dumps(result)}" for task, result in self.harness.items()]
        return "\n".join(lines)

    def _examples(self) -> list[str]:
        """A few answers of each task, right ones and wrong ones."""
        lines = []
        for (task, right), group in _grouped(self.answers).items():
            for answer in group[:SHOWN]:
                question, said = answer.question.prompt.text, answer.completion.strip().replace("\n", "\\n")
                correct = "" if right else f"   expected: {answer.question.answer}"
                lines.append(f"{'':<12}{task}, {'right' if right else 'wrong'}: {question}   {said}{correct}")
        return lines

    def write(self, folder: Path) -> None:
        """Write scores.json and scores.png, and answers.jsonl where there are any."""
        folder.mkdir(parents=True, exist_ok=True)
        content: dict[str, Any] = {**self.about, "accuracy": {}, "perplexity": {}, "harness": self.harness}
        for name, subjects in self.accuracies.items():
            rows = {subject: _row(accuracy) for subject, accuracy in subjects.items()}
            content["accuracy"][name] = {"all": _row(self.total(name)), "subjects": rows}
        for name, text in self.perplexities.items():
            values = {"perplexity": text.value, "bits_per_byte": text.bits_per_byte}
            content["perplexity"][name] = values | {"tokens": text.tokens, "bytes": text.bytes, "nats": text.nats}
        content["quality"] = {name: replies.row() for name, replies in self.quality.items()}
        if self.outcomes:
            content["rounds"] = sum(outcome.rounds for outcome in self.outcomes) / len(self.outcomes)
        atomic_write_text(folder / JSON, json.dumps(content, indent=1, ensure_ascii=False) + "\n")
        said = [*(answer.row() for answer in self.answers), *(outcome.row() for outcome in self.outcomes)]
        if said:
            lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in said]
            atomic_write_text(folder / ANSWERS, "".join(lines))
        if self.accuracies:
            with atomic_file(folder / PICTURE) as file:
                file.write(self._draw())

    def _draw(self) -> bytes:
        """A bar for each subject, and for all of a benchmark."""
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib.figure import Figure

        bars = []
        for name, subjects in self.accuracies.items():
            bars += [(f"{name}: {subject}", row, "tab:blue") for subject, row in subjects.items()]
            bars.append((name, self.total(name), "tab:orange"))
        figure = Figure(figsize=(8, 1 + 0.28 * len(bars)), layout="constrained")
        axes = figure.subplots()
        errors = [0 if math.isnan(row.error) else row.error for _, row, _ in bars]
        axes.barh(range(len(bars)), [row.value for _, row, _ in bars], xerr=errors, color=[c for *_, c in bars])
        axes.set_yticks(range(len(bars)), [label for label, *_ in bars])
        axes.invert_yaxis()
        if any(row.by_length is not None for _, row, _ in bars):
            axes.axvline(CHANCE, color="gray", linestyle="--", label="chance")
            axes.legend()
        axes.set(xlim=(0, 1), xlabel="accuracy, with its standard error", title=str(self.about["model"]))
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=100)
        return buffer.getvalue()


def _grouped(answers: Sequence[Answered]) -> dict[tuple[str, bool], list[Answered]]:
    """By task, and whether they are right."""
    groups: dict[tuple[str, bool], list[Answered]] = {}
    for answer in answers:
        groups.setdefault((answer.question.task, answer.right), []).append(answer)
    return dict(sorted(groups.items(), key=lambda group: (group[0][0], not group[0][1])))


def _row(accuracy: Accuracy) -> dict[str, float | int | None]:
    error = None if math.isnan(accuracy.error) else accuracy.error
    values = {"questions": accuracy.questions, "accuracy": accuracy.value, "standard_error": error}
    return {**values, **({} if accuracy.by_length is None else {"accuracy_by_length": accuracy.by_length})}
