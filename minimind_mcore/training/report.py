"""The curves of a run, from metrics.jsonl: loss.png with the loss, and report.html with all curves.

The report of reinforcement learning also shows the last responses of samples.jsonl.

    python -m minimind_mcore.training.report OUTPUT_DIR
"""

from __future__ import annotations

import argparse
import html
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

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

    If `metrics.jsonl` has no rows, no file is written. The responses in `samples.jsonl` of reinforcement learning are
    added to `report.html`.
    """
    rows = read_history(directory / "metrics.jsonl")
    if not rows:
        return
    save_png(_figure(rows, names, title), directory / picture)
    drawn = {name: label for name, label in CURVES.items() if any(name in row for row in rows)}
    figures = "\n".join(svg(_figure(rows, [name], label)) for name, label in drawn.items())
    template = (PACKAGE / "training/report.html.in").read_text(encoding="utf-8")
    samples = responses(read_history(directory / "samples.jsonl"))
    page = template.format(title=html.escape(title), summary=_summary(rows), figures=figures, samples=samples)
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


def responses(samples: Sequence[Mapping[str, Any]]) -> str:
    """Return the responses of the last sampled step of reinforcement learning as HTML, or "" if there are none.

    The background of a response shows the sign of its advantage. The color of a segment shows its source: the policy,
    or an environment. Segments of the policy that are not in the loss are underlined.
    """
    if not samples:
        return ""
    last = samples[-1]["iteration"]
    parts = [_response(sample) for sample in samples if sample["iteration"] == last]
    legend = (
        'Background: <span class="above">advantage above 0</span> <span class="below">advantage below 0</span>. '
        'Text: <span class="policy">policy</span> <span class="environment">environment</span> '
        '<span class="policy unused">not in the loss</span>.'
    )
    return "\n".join([f"<h2>Responses of step {last}</h2>", f"<p>{legend}</p>", *parts])


def _response(sample: Mapping[str, Any]) -> str:
    advantage = sample.get("advantage", 0.0)
    sign = "above" if advantage > 0 else "below" if advantage < 0 else "even"
    facts = [f"{name} {sample[name]}" for name in ("reward", "label") if sample.get(name)]
    facts += [f"advantage {advantage:+.3g}"] if "advantage" in sample else []
    whole = {"source": "policy", "text": sample.get("response", ""), "in_loss": True}
    segments = [_segment(part) for part in sample.get("segments", [whole])]
    prompt = html.escape(str(sample.get("prompt", "")))
    return (
        f'<div class="response {sign}"><p>{html.escape(", ".join(facts))}</p><pre class="prompt">{prompt}</pre>'
        f"<pre>{''.join(segments)}</pre></div>"
    )


def _segment(part: Mapping[str, Any]) -> str:
    kind = "environment" if part["source"] == "environment" else "policy" if part["in_loss"] else "policy unused"
    return f'<span class="{kind}">{html.escape(str(part["text"]))}</span>'


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
