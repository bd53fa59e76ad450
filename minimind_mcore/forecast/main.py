"""minimind-mcore plan MODEL: memory and time of a model on devices, and the layouts to use.

    minimind-mcore plan minimind3 --devices 8 --device 910B
    minimind-mcore plan minimind3_moe --devices 16 --device H100 --stage pretrain --memory 40GiB
    minimind-mcore plan minimind3 --device H100 --scaling

The devices need not exist on this host. docs/plan.md explains the columns.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Sequence

import psutil

from minimind_mcore.errors import UserError
from minimind_mcore.forecast import layouts, machines, speed
from minimind_mcore.forecast.layouts import STAGES, Proposal
from minimind_mcore.forecast.memory import GIB
from minimind_mcore.inputs.flags import documented_parser
from minimind_mcore.inputs.ranges import flag_type
from minimind_mcore.models.presets import find_model

UNITS = {"MiB": 2**20, "GiB": GIB, "TiB": 2**40, "MB": 10**6, "GB": 10**9, "TB": 10**12}
SHOWN = 3  # layouts shown per stage; --stage shows all of its layouts


def main(argv: Sequence[str] | None = None) -> None:
    """Print the forecast.

    Raises:
        UserError: no layout fits, or the memory is not a size.
    """
    parser = documented_parser("minimind-mcore plan", __doc__)
    parser.add_argument("model", help="a preset, or an HF directory or config.json")
    parser.add_argument("--devices", type=flag_type("data_parallel_size"), default=1, help="processes (default: 1)")
    parser.add_argument(
        "--device", choices=list(machines.table()), default="910B", help="device of a process; a CPU: one core"
    )
    parser.add_argument("--memory", help="memory of a device, such as 64GiB (default: its own; a CPU: a share of RAM)")
    parser.add_argument("--stage", choices=STAGES, help="show all layouts of this stage (default: the best of each)")
    parser.add_argument("--scaling", action="store_true", help="show pretraining on 1 to 10,000 devices")
    args = parser.parse_args(argv)
    model, machine, devices = find_model(args.model), machines.machine(args.device), int(args.devices)
    limit = size(args.memory) if args.memory else machine.memory or psutil.virtual_memory().total / devices
    title = f"{args.model}, {model.num_parameters() / 1e6:.2f}M parameters, on"
    if args.scaling:
        print(f"{title} 1 to {layouts.SCALES[-1]:,} x {args.device} of {limit / GIB:.3g} GiB\n")
        print_scaling(args.model, *layouts.scale(args.model, model, machine, limit))
    else:
        print(f"{title} {devices} x {args.device} of {limit / GIB:.3g} GiB")
        for stage in [args.stage] if args.stage else STAGES:
            found = layouts.propose(args.model, model, stage, devices, machine, limit)
            print_layouts(stage, found, len(found) if args.stage else SHOWN)
    print(f"\nsources of the numbers of {args.device} (SI units):")
    print("\n".join(machines.sources(args.device)))


def size(text: str) -> float:
    """Parse a size such as `64GiB` to bytes.

    Raises:
        UserError: the text is not a size above zero.
    """
    found = re.fullmatch(r"([0-9.]+) *([A-Za-z]+)", text)
    try:
        number = float(found[1]) * UNITS[found[2]] if found else 0.0
    except (ValueError, KeyError):
        number = 0.0
    if not (0 < number < math.inf):
        raise UserError(f"--memory: found {text!r}, expected a size above zero with one of {', '.join(UNITS)}")
    return number


def print_layouts(stage: str, found: Sequence[Proposal], shown: int) -> None:
    """Print the first layouts: the time of a step and the bytes sent, then the memory of a rank."""
    work = found[0].work
    what = "pairs" if work.sequences == 2 else "responses" if stage == "grpo" else "samples"
    precision = "fp32" if work.width == 4 else "bf16"
    print(f"\n{stage}: {work.global_batch_size:,} {what} of up to {work.seq_length} tokens in a step, {precision}")
    for columns in (times, memories):
        rows = [columns(one) for one in found[:shown]]
        names = dict.fromkeys(itertools.chain.from_iterable(rows))  # a row may leave out a part that is zero
        kept = [name for name in names if any(row.get(name, "0") not in ("0", "0.00") for row in rows)]
        print_table([kept, *([row.get(name, "0.00") for name in kept] for row in rows)])
    if len(found) > shown:
        print(f"{len(found) - shown} further layouts: --stage {stage}")


def sizes(one: Proposal) -> dict[str, str]:
    """Return TP, PP, EP, DP and the micro-batch as cells of text."""
    layout = one.work.layout
    return {"TP PP EP DP": f"{layout.tp} {layout.pp} {layout.ep} {layout.dp}", "MBS": str(one.work.micro_batch_size)}


def times(one: Proposal) -> dict[str, str]:
    """Return the time of a step and the bytes that the busiest rank sends in it, as cells of text."""
    layout, seconds = one.work.layout, {name: part for name, part in one.seconds.items() if name != "bubble"}
    return {
        **sizes(one),
        "step ms": f"{one.step * 1e3:.0f}",
        **{f"{name} ms": f"{part * 1e3:.0f}" for name, part in seconds.items()},
        "bubble": f"{speed.bubble(layout.pp, one.work.num_microbatches, layout.vpp or 1):.0%}",
        **{f"{name} MiB": f"{sent / 2**20:.0f}" for name, sent in speed.volume(one.work).items()},
        "tokens/s": f"{one.tokens_per_second:.0f}",
        "MFU": f"{one.utilization:.1%}",
    }


def memories(one: Proposal) -> dict[str, str]:
    """Return the memory of a rank in GiB, as cells of text."""
    parts = {name: f"{part / GIB:.2f}" for name, part in one.memory.items()}
    return {**sizes(one), "GiB": f"{one.bytes / GIB:.2f}", "program": f"{one.machine.program / GIB:.2f}", **parts}


def print_table(rows: Sequence[Sequence[str]]) -> None:
    """Print rows as a table. Each column is as wide as its widest cell."""
    widths = [max(map(len, cells)) for cells in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True)))


def print_scaling(name: str, rows: Sequence[layouts.Scale], why: str) -> None:
    """Print the table of scaling and the sentence that says where scaling stops."""
    batch = rows[0].best.work.global_batch_size
    print(f"pretraining, {batch:,} samples of {rows[0].best.work.seq_length} tokens in a step; time of a step in ms")
    table = [["devices", "used", "TP PP EP DP", "MBS", "step", *layouts.REASONS, "tokens/s", "efficiency"]]
    for row in rows:
        one, layout = row.best, row.best.work.layout
        cells = [f"{row.devices:,}", f"{layout.world_size:,}", f"{layout.tp} {layout.pp} {layout.ep} {layout.dp}"]
        cells += [str(one.work.micro_batch_size), f"{one.step * 1e3:.1f}"]
        cells += [f"{one.seconds[part] * 1e3:.1f}" for part in layouts.REASONS]
        table.append([*cells, f"{one.tokens_per_second:,.0f}", f"{row.efficiency:.0%}"])
    print_table(table)
    print(f"{name} {why}")
