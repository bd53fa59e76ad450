"""Write the report of a run: report.md, and report.html, which loads nothing from the network."""

from __future__ import annotations

import html
import importlib.metadata
import json
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import minimind_mcore
from minimind_mcore.paths import PACKAGE
from minimind_mcore.pipeline.job import Record
from minimind_mcore.pipeline.sample import MATH_SFT_STAGE
from minimind_mcore.pipeline.stages import RL, TRAININGS, Run
from minimind_mcore.platform import device
from minimind_mcore.storage import atomic_write_text
from minimind_mcore.training.metrics import Row, read_history
from minimind_mcore.training.report import plot, save_png, svg

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TRAINED = (*TRAININGS, MATH_SFT_STAGE, *RL)
PROMPTS = 5  # prompts whose replies are shown
PACKAGES = ("torch", "megatron-core", "transformers", "numpy")
LOSSES = ("lm_loss", "grpo/score/mean")  # metrics to plot; the first one that a stage logs is used
Table = tuple[str, Sequence[str], Sequence[Sequence[str]]]  # title, column names, rows


def write(run: Run) -> None:
    """Write a report of all finished jobs in the output directory of a run."""
    records = {name: found for name in _names() if (found := run.records.read(name)).get("finished")}
    trained = [name for name in TRAINED if name in records]
    histories = {name: read_history(run.folder(name) / "metrics.jsonl") for name in trained}
    tables = [
        _stages(records, histories), _scores(run, trained), _replies(run, trained), _versions(run),
        ("Commands", ("job", "command"), [(n, text) for n, r in records.items() for text in r.get("commands", [])]),
        ("Settings", ("job", "setting", "value"),
         [(n, *pair) for n, record in records.items() for pair in record.get("settings", {}).items()]),
        ("Inputs", ("job", "input", "SHA-256, or digest of the weights"),
         [(n, *pair) for n, record in records.items() for pair in record.get("inputs", {}).items()]),
    ]  # fmt: skip
    title = f"MiniMind: {run.model}"
    figure = _figure(histories)
    template = (PACKAGE / "pipeline/report.html.in").read_text(encoding="utf-8")
    page = template.format(title=html.escape(title), figure=svg(figure), tables="\n".join(map(_html, tables)))
    atomic_write_text(run.output / "report.html", page)
    save_png(figure, run.output / "loss.png")
    text = "\n".join(map(_markdown, tables))
    atomic_write_text(run.output / "report.md", f"# {title}\n\n![losses of all stages](loss.png)\n\n{text}")
    print(f"\nreport      {run.output / 'report.html'}  {run.output / 'report.md'}", flush=True)


def _names() -> list[str]:
    return ["download", "tokenizer", *TRAINED, *(f"eval-{name}" for name in TRAINED), "convert"]


def _stages(records: Mapping[str, Record], histories: Mapping[str, list[Row]]) -> Table:
    rows = []
    for name, record in records.items():
        seconds, devices = record.get("seconds", 0.0), record.get("processes", 1) if name in histories else 1
        history = histories.get(name, [])
        tokens = _tokens(history, devices)
        rows.append(
            (name, f"{seconds:,.0f}", f"{tokens:,.0f}" if tokens else "", f"{seconds * devices / 3600:.3f}",
             _last(history), record.get("weights", ""))
        )  # fmt: skip
    total = sum(record.get("seconds", 0.0) for record in records.values())
    rows.append(("all", f"{total:,.0f}", "", f"{sum(float(row[3]) for row in rows):.3f}", "", ""))
    return "Stages", ("job", "seconds", "tokens", "device-hours", "last loss or reward", "digest of the weights"), rows


def _tokens(history: Sequence[Row], devices: int) -> float:
    """Return the number of tokens of a training, or 0 if it is not known.

    Without a logged count, compute the number from tokens per second. In reinforcement learning these are the tokens of
    prompts and responses, per device and second.
    """
    if history and "consumed_tokens" in history[-1]:
        return history[-1]["consumed_tokens"]
    total, before = 0.0, 0.0
    for row in (row for row in history if "tokens_per_second" in row):
        total += (row["iteration"] - before) * row["seconds_per_iteration"] * row["tokens_per_second"]
        before = row["iteration"]
    return total + devices * sum(row["e2e_tps"] * row.get("timing/all", 0.0) for row in history if "e2e_tps" in row)


def _curve(history: Sequence[Row]) -> list[tuple[float, float]]:
    return next(
        (points for name in LOSSES if (points := [(r["iteration"], r[name]) for r in history if name in r])), []
    )


def _last(history: Sequence[Row]) -> str:
    points = _curve(history)
    return f"{points[-1][1]:.4f}" if points else ""


def _figure(histories: Mapping[str, list[Row]]) -> Figure:
    """Plot the curves of all stages side by side."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.2 * max(2, len(histories)), 3.2))
    axes = figure.subplots(1, max(1, len(histories)), squeeze=False)
    for axis, (name, history) in zip(axes[0], histories.items(), strict=False):
        plot(axis, name, {name: _curve(history)})
    figure.tight_layout()
    return figure


def _scores(run: Run, trained: Sequence[str]) -> Table:
    rows = []
    for name in trained:
        file = run.output / "eval" / name / "scores.json"
        if not file.is_file():
            continue
        scores: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        for task, found in scores.get("accuracy", {}).items():
            subjects = found.get("subjects", {})
            rows += [(name, f"{task}: {s}", f"{v['accuracy']:.1%} of {v['questions']}") for s, v in subjects.items()]
        for text, value in scores.get("perplexity", {}).items():
            shown = value["perplexity"] if isinstance(value, dict) else value
            rows.append((name, f"perplexity: {Path(text).name}", f"{shown:.3f}"))
        for text, value in scores.get("quality", {}).items():
            rows.append((name, f"replies that end: {Path(text).name}", f"{value['ended']:.1%}"))
    order = {task: None for _, task, _ in rows}  # group rows by task, so that stages can be compared
    return "Scores", ("model after", "score", "value"), sorted(rows, key=lambda row: list(order).index(row[1]))


def _replies(run: Run, trained: Sequence[str]) -> Table:
    found: dict[str, list[tuple[str, str]]] = {}
    for name in trained:
        file = run.output / "eval" / name / "replies.jsonl"
        lines = file.read_text(encoding="utf-8").splitlines()[:PROMPTS] if file.is_file() else []
        for row in map(json.loads, lines):
            messages = row["messages"]
            asked = messages if isinstance(messages, str) else messages[-1]["content"]
            found.setdefault(asked, []).append((name, row["completion"]))
    rows = [(prompt, stage, reply) for prompt, replies in found.items() for stage, reply in replies]
    return "Replies", ("prompt", "model after", "reply"), rows


def _versions(run: Run) -> Table:
    here = device.current()
    rows = [("minimind-mcore", minimind_mcore.__version__), ("Python", platform.python_version())]
    for name in PACKAGES:
        try:
            rows.append((name, importlib.metadata.version(name)))
        except importlib.metadata.PackageNotFoundError:
            rows.append((name, "not installed as a package"))
    rows += [("device", f"{here.count} x {here.kind}: {here.name}"), ("stages of the last run", " ".join(run.stages))]
    return "Versions", ("what", "version"), rows


def _html(table: Table) -> str:
    title, head, rows = table
    lines = ["".join(f"<th>{html.escape(cell)}</th>" for cell in head)]
    lines += ["".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in rows]
    return f"<h2>{title}</h2>\n<table>\n" + "\n".join(f"<tr>{line}</tr>" for line in lines) + "\n</table>"


def _markdown(table: Table) -> str:
    title, head, rows = table

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"

    return "\n".join([f"## {title}", "", line(head), "|" + "---|" * len(head), *map(line, rows), ""])
