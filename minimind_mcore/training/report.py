"""The curves of a run: loss.png, and report.html with all of them. Both are made from metrics.jsonl alone.

python -m minimind_mcore.training.report OUTPUT_DIR
"""

from __future__ import annotations

import argparse
import html
import io
import json
from collections.abc import Sequence
from pathlib import Path

from minimind_mcore import errors
from minimind_mcore.paths import PACKAGE
from minimind_mcore.storage import atomic_file, atomic_write_text
from minimind_mcore.training.metrics import Row, read_history

CURVES: dict[str, str] = json.loads((PACKAGE / "training/curves.json").read_text(encoding="utf-8"))

LOSSES = ("lm_loss", "validation_loss")


def write_report(directory: Path, title: str, names: Sequence[str] = LOSSES, picture: str = "loss.png") -> None:
    """Draw `picture`, of the named columns, and `report.html` into `directory` from its `metrics.jsonl`.

    Nothing if that is empty.
    """
    rows = read_history(directory / "metrics.jsonl")
    if not rows:
        return
    with atomic_file(directory / picture) as f:
        f.write(draw(rows, names, title, "png"))
    figures = [
        draw(rows, [name], label, "svg").decode("utf-8").partition("<svg")[2]
        for name, label in CURVES.items()
        if any(name in row for row in rows)
    ]
    template = (PACKAGE / "training/report.html.in").read_text(encoding="utf-8")
    page = template.format(
        title=html.escape(title), summary=_summary(rows), figures="\n".join("<svg" + figure for figure in figures)
    )
    atomic_write_text(directory / "report.html", page)


def draw(rows: list[Row], names: Sequence[str], title: str, kind: str) -> bytes:
    """One figure of the named columns over the iterations, as bytes of a "png" or an "svg"."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5))
    for name in names:
        points = [(row["iteration"], row[name]) for row in rows if name in row]
        if points:
            axes.plot(*zip(*points, strict=True), label=CURVES[name], marker="o" if len(points) < 30 else None, ms=3)
    axes.set_xlabel("iteration")
    axes.set_title(title)
    axes.grid(alpha=0.3)
    if len(names) > 1:
        axes.legend()
    figure.tight_layout()
    buffer = io.BytesIO()
    figure.savefig(buffer, format=kind, dpi=120, metadata={"Date": None} if kind == "svg" else None)
    pyplot.close(figure)
    return buffer.getvalue()


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
    parser.add_argument("directory", type=Path, help="the OUTPUT_DIR of a training, which has metrics.jsonl")
    directory = parser.parse_args(argv).directory
    if not (directory / "metrics.jsonl").is_file():
        raise errors.UserError(f"{directory}: found no metrics.jsonl there; expected the OUTPUT_DIR of a training")
    write_report(directory, f"MiniMind, {directory.name}")
    print(directory / "loss.png", directory / "report.html", sep="\n")


if __name__ == "__main__":
    errors.run(main)
