"""Results of an evaluation: a table, scores.json, scores.png, and the answers if there are any."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minimind_mcore.inference.exact_match import Answered
from minimind_mcore.inference.likelihood import Accuracy, Perplexity
from minimind_mcore.inference.quality import Quality
from minimind_mcore.inference.toolcall import TOOLCALL, Outcome, summary
from minimind_mcore.storage import atomic_file, atomic_write_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

JSON, PICTURE, ANSWERS = "scores.json", "scores.png", "answers.jsonl"
CHANCE = 0.25  # accuracy of random answers in the benchmarks
SHOWN = 3


@dataclass
class EvaluationResults:
    """The results of an evaluation.

    Attributes:
        about: the model and the settings.
        accuracies: by benchmark and subject.
        answers: the model's answers in exact_match.
        perplexities: by held-out text.
        harness: results of lm-evaluation-harness, by task.
        outcomes: results of the test cases with tool calls.
        quality: quality of the replies, by task.
    """

    about: dict[str, Any]
    accuracies: dict[str, dict[str, Accuracy]] = field(default_factory=dict)
    answers: list[Answered] = field(default_factory=list)
    perplexities: dict[str, Perplexity] = field(default_factory=dict)
    harness: dict[str, Any] = field(default_factory=dict)
    outcomes: list[Outcome] = field(default_factory=list)
    quality: dict[str, Quality] = field(default_factory=dict)

    def total(self, benchmark: str) -> Accuracy:
        """Return the accuracy over all subjects of a benchmark. For tool calls it is the rate `exact`."""
        if benchmark == TOOLCALL and "exact" in self.accuracies[benchmark]:
            return self.accuracies[benchmark]["exact"]
        first, *others = self.accuracies[benchmark].values()
        return sum(others, first)

    def add_answers(self, benchmark: str, answers: Sequence[Answered]) -> None:
        """Count the right answers of each task."""
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
        """Return the results as lines of text."""
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

    def _examples(self) -> Iterator[str]:
        """Yield a few right and wrong answers of each task."""
        for (task, right), group in _grouped(self.answers).items():
            for answer in group[:SHOWN]:
                question, said = answer.question.prompt.text, answer.completion.strip().replace("\n", "\\n")
                correct = "" if right else f"   expected: {answer.question.answer}"
                yield f"{'':<12}{task}, {'right' if right else 'wrong'}: {question}   {said}{correct}"

    def write(self, folder: Path) -> None:
        """Write scores.json and scores.png, and answers.jsonl if there are answers."""
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
                self._figure().savefig(file, format="png", dpi=100)

    def _figure(self) -> Figure:
        """Draw a bar for each subject, and one for the total of each benchmark."""
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
        return figure


def _grouped(answers: Sequence[Answered]) -> dict[tuple[str, bool], list[Answered]]:
    """Group answers by task and correctness."""
    groups: dict[tuple[str, bool], list[Answered]] = {}
    for answer in answers:
        groups.setdefault((answer.question.task, answer.right), []).append(answer)
    return dict(sorted(groups.items(), key=lambda group: (group[0][0], not group[0][1])))


def _row(accuracy: Accuracy) -> dict[str, float | int | None]:
    error = None if math.isnan(accuracy.error) else accuracy.error
    values = {"questions": accuracy.questions, "accuracy": accuracy.value, "standard_error": error}
    return {**values, **({} if accuracy.by_length is None else {"accuracy_by_length": accuracy.by_length})}
