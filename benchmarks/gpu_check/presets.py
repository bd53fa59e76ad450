"""Every preset, shrunk: its logits and the losses of ten steps, against values that a CPU computed in fp32.

    python -m gpu_check.presets             # compare, on the device of DEVICE
    python -m gpu_check.presets --record    # compute recorded_cpu.json again, on the CPU

The weights follow from a seed and each tensor's name, the token ids from another seed, so nothing but the results is
recorded. A mixture of experts must not have a token whose two best experts score almost alike: rounding would send it
to the other one, and the comparison would say nothing. `--record` therefore takes the first seed whose results stay
when all weights change by one millionth, and whose results in bf16 on this CPU are well within the tolerance.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gpu_check.rows import emit

FILE = Path(__file__).with_name("recorded_cpu.json")
PRESETS = ("minimind3_tiny", "minimind3_moe_tiny", "minimind2_small_tiny", "minimind2_tiny", "minimind2_moe_tiny",
           "minimind2_moe_768_tiny")  # fmt: skip
TOLERANCES = {"fp32": 1e-4, "bf16": 2e-2}
VOCABULARY, BATCH, SEQUENCE, STEPS = 512, 2, 48, 10
ROWS, COLUMNS = 6, 16  # every so manieth position and token id of the logits is recorded
WELL_WITHIN = 0.75
STABLE = 2e-5  # relative change that one millionth of the weights may make


def results(name: str, bf16: bool, seed: int, noise: float = 0.0) -> dict[str, list[float]]:
    """Logits of the initial model at some positions and token ids, and the losses of ten steps."""
    import torch
    from native_engine import NativeEngine

    from minimind_mcore import device
    from minimind_mcore.models.presets import get_preset

    config = get_preset(name).replace(vocab_size=VOCABULARY)
    engine = NativeEngine(config, BATCH, SEQUENCE, bf16, flags=("--seed", str(seed), "--init-method-std", "0.05"))
    numbers = torch.Generator().manual_seed(seed)
    place = device.current().torch_device
    try:
        if noise:
            _disturb(engine.model, noise)
            engine.optimizer.reload_model_params()
        ids = torch.randint(0, VOCABULARY, (STEPS + 1, BATCH, SEQUENCE + 1), generator=numbers).to(place)
        logits = engine.logits(ids[0, :, :-1])[:, ::ROWS, ::COLUMNS].flatten().tolist()
        losses = [float(engine.step(batch)) for batch in ids[1:]]
    finally:
        engine.close()
    return {"logits": logits, "losses": losses}


def _disturb(model: Sequence[Any], size: float) -> None:
    import torch

    numbers = torch.Generator().manual_seed(99)
    with torch.no_grad():
        for chunk in model:
            for parameter in chunk.parameters():
                change = torch.randn(parameter.shape, generator=numbers).to(parameter.device, parameter.dtype)
                parameter.mul_(1 + size * change)


def differences(found: dict[str, list[float]], expected: dict[str, list[float]], key: str) -> list[float]:
    """Relative differences: |found - expected| / |expected| of each step's loss, the same in norms of each position."""
    pairs = list(zip(found[key], expected[key], strict=True))
    width = 1 if key == "losses" else VOCABULARY // COLUMNS
    parts = (pairs[start : start + width] for start in range(0, len(pairs), width))
    return [math.sqrt(sum((a - b) ** 2 for a, b in part) / sum(b * b for _, b in part)) for part in parts]


def worst(ratios: Sequence[float], median: bool = False) -> float:
    """Return the largest ratio or the median; NaN if any ratio is not finite, which no order has a place for."""
    if not all(map(math.isfinite, ratios)):
        return math.nan
    return sorted(ratios)[len(ratios) // 2] if median else max(ratios)


def compare(names: Sequence[str], dtypes: Sequence[str]) -> None:
    recorded = json.loads(FILE.read_text(encoding="utf-8"))["presets"]
    for name in names:
        for dtype in dtypes:
            found = results(name, dtype == "bf16", recorded[name]["seed"])
            allowed = TOLERANCES[dtype]
            for key in ("logits", "losses"):
                median = uses_median(name, dtype, key)
                apart = worst(differences(found, recorded[name], key), median)
                note = f"relative difference, {'median' if median else 'maximum'}; at most {allowed:g}"
                emit(f"{name}, {dtype}: {key}", apart, ok=apart <= allowed, note=note)  # NaN fails


def uses_median(name: str, dtype: str, key: str) -> bool:
    """Whether the median over positions is compared, and not the maximum: for the logits of mixtures in bf16.

    There rounding sends a token whose two best experts score almost alike to the other expert. This says nothing about
    the arithmetic, and changes the logits of that position by a few percent.
    """
    return dtype == "bf16" and key == "logits" and "moe" in name


def record() -> None:
    import torch

    body: dict[str, Any] = {}
    for name in PRESETS:
        for seed in range(1, 50):
            found = results(name, False, seed)
            moved = results(name, False, seed, noise=1e-6)
            rounded = results(name, True, seed)
            noise = max(worst(differences(moved, found, key)) for key in found)
            rounding = max(worst(differences(rounded, found, key), uses_median(name, "bf16", key)) for key in found)
            if noise < STABLE and rounding < WELL_WITHIN * TOLERANCES["bf16"]:
                break
        else:
            raise SystemExit(f"{name}: no seed up to 49 is stable")
        body[name] = {"seed": seed} | {key: [float(f"{x:.8g}") for x in values] for key, values in found.items()}
        print(f"{name}: seed {seed}", flush=True)
    facts = {"by": "python -m gpu_check.presets --record (PYTHONPATH=benchmarks:.)", "torch": torch.__version__}
    FILE.write_text(json.dumps(facts | {"presets": body}) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presets", nargs="+", choices=PRESETS, default=list(PRESETS))
    parser.add_argument("--dtypes", nargs="+", choices=tuple(TOLERANCES), default=list(TOLERANCES))
    parser.add_argument("--record", action="store_true", help="compute the values again, on the CPU")
    parser.add_argument("--tiny", action="store_true", help="has no effect: the sizes are small anyway")
    args = parser.parse_args()
    from minimind_mcore import device

    found = device.setup()
    if args.record:
        if found.kind != "cpu":
            sys.exit("--record: the values are a CPU's; set DEVICE=cpu")
        record()
    else:
        compare(args.presets, args.dtypes)


if __name__ == "__main__":
    main()
