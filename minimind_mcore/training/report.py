"""The curves of a run, from metrics.jsonl: loss.png with the loss, and report.html with all curves.

python -m minimind_mcore.training.report OUTPUT_DIR
"""

from __future__ import annotations

import argparse
import html
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from minimind_mcore import errors
from minimind_mcore.paths import PACKAGE, package_json
from minimind_mcore.storage import atomic_file, atomic_write_text
from minimind_mcore.training.metrics import Row, read_history

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CURVES: dict[str, str] = package_json("training/curves.json")

LOSSES = ("lm_loss", "validation_loss")


def write_report(directory: Path, title: str, names: Sequence[str] = LOSSES, picture: str = "loss.png") -> None:
    """Draw `picture` with the named columns, and `report.html`, from `metrics.jsonl` in `directory`.

    Without any row nothing is drawn.
    """
    rows = read_history(directory / "metrics.jsonl")
    if not rows:
        return
    save_png(_figure(rows, names, title), directory / picture)
    drawn = {name: label for name, label in CURVES.items() if any(name in row for row in rows)}
    figures = "\n".join(svg(_figure(rows, [name], label)) for name, label in drawn.items())
    template = (PACKAGE / "training/report.html.in").read_text(encoding="utf-8")
    page = template.format(title=html.escape(title), summary=_summary(rows), figures=figures)
    atomic_write_text(directory / "report.html", page)


def _figure(rows: list[Row], names: Sequence[str], title: str) -> Figure:
    """Plot the named columns over the iterations."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5))
    axes = figure.subplots()
    plot(axes, title, {CURVES[name]: [(row["iteration"], row[name]) for row in rows if name in row] for name in names})
    if len(names) > 1:
        axes.legend()
    figure.tight_layout()
    return figure


def plot(axes: Axes, title: str, curves: Mapping[str, Sequence[tuple[float, float]]]) -> None:
    """Draw curves over the iterations, each with its label."""
    for label, points in curves.items():
        if points:
            axes.plot(*zip(*points, strict=True), label=label, marker="o" if len(points) < 30 else None, ms=3)
    axes.set(title=title, xlabel="iteration")
    axes.grid(alpha=0.3)


def svg(figure: Figure) -> str:
    """Return a figure as SVG for a page."""
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None})
    return "<svg" + text.getvalue().partition("<svg")[2]


def save_png(figure: Figure, path: Path) -> None:
    """Save a figure as a PNG file."""
    with atomic_file(path) as file:
        figure.savefig(file, format="png", dpi=120)


def _summary(rows: list[Row]) -> str:
    training = [row for row in rows if "lm_loss" in row]
    if not training:
        return ""
    first, last = training[0], training[-1]
    speeds = sorted(row["tokens_per_second"] for row in training)
    facts = {
        "iterations": last["iteration"],
        **({"tokens": f"{last['consumed_tokens']:,}"} if "consumed_tokens" in last else {}),
        "first loss": f"{first['lm_loss']:.4f} (iteration {first['iteration']})",
        "last loss": f"{last['lm_loss']:.4f}",
        "tokens per second": f"{speeds[len(speeds) // 2]:,.0f} (median)",
    }
    return "".join(f"<tr><td>{name}</td><td>{value}</td></tr>" for name, value in facts.items())


def main(argv: Sequence[str] | None = None) -> None:
    """Draw the report of a directory again."""
    parser = argparse.ArgumentParser(prog="minimind-mcore report", description=main.__doc__)
    parser.add_argument("directory", type=Path, help="the OUTPUT_DIR of a training run, with metrics.jsonl")
    directory = parser.parse_args(argv).directory
    if not (directory / "metrics.jsonl").is_file():
        raise errors.UserError(f"{directory}: found no metrics.jsonl there; expected the OUTPUT_DIR of a training run")
    write_report(directory, f"MiniMind, {directory.name}")
    print(directory / "loss.png", directory / "report.html", sep="\n")


if __name__ == "__main__":
    errors.run(main)
