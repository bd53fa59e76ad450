"""Compare the logits and the losses of ten steps of every preset, shrunk, with values that a CPU computed in fp32.

    python -m gpu_check.presets             # compare, on the device of DEVICE
    python -m gpu_check.presets --record    # compute recorded_cpu.json again, on the CPU

Weights and token ids are derived from a seed, so only the results are recorded. Rounding must not change which expert a
token is routed to, or the comparison would be meaningless. For fp32 `--record` therefore searches for the first seed
whose results are stable when all weights change by one millionth. With bf16 no seed is stable, so the logits are
computed with the recorded experts of each token.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from gpu_check.rows import emit

FILE = Path(__file__).with_name("recorded_cpu.json")
PRESETS = ("minimind3_tiny", "minimind3_moe_tiny", "minimind2_small_tiny", "minimind2_tiny", "minimind2_moe_tiny",
           "minimind2_moe_768_tiny")  # fmt: skip
TOLERANCES = {"fp32": 1e-4, "bf16": 2e-2}
VOCABULARY, BATCH, SEQUENCE, STEPS = 512, 2, 48, 10
ROWS, COLUMNS = 6, 16  # stride in positions and in token ids of the recorded logits
STABLE = 2e-5  # allowed relative change of the results when all weights change by one millionth


def results(
    name: str, bf16: bool, seed: int, noise: float = 0.0, experts: list[list[int]] | None = None
) -> dict[str, Any]:
    """Return logits, losses and experts.

    Args:
        name: name of the preset.
        bf16: mixed precision instead of fp32.
        seed: seed of weights and token ids.
        noise: relative change that is applied to all weights first.
        experts: experts to route tokens to, in the format of the result.

    Returns:
        `logits` of the initial model at some positions and token ids; `losses` of ten steps; `experts`, for each layer
        the chosen experts as token * num_experts + expert.
    """
    import torch
    from native_engine import NativeEngine

    from minimind_mcore.models.presets import get_preset
    from minimind_mcore.platform import device

    config = get_preset(name).replace(vocab_size=VOCABULARY)
    engine = NativeEngine(config, BATCH, SEQUENCE, bf16, flags=("--seed", str(seed), "--init-method-std", "0.05"))
    numbers = torch.Generator().manual_seed(seed)
    place = device.current().torch_device
    try:
        if noise:
            _disturb(engine.model, noise)
            assert engine.engine is not None
            engine.engine.take_weights()
        ids = torch.randint(0, VOCABULARY, (STEPS + 1, BATCH, SEQUENCE + 1), generator=numbers).to(place)
        with _routed(engine.model, experts) as chosen:
            logits = engine.logits(ids[0, :, :-1])[:, ::ROWS, ::COLUMNS].flatten().tolist()
        losses = [float(engine.step(batch)) for batch in ids[1:]]
    finally:
        engine.close()
    return {"logits": logits, "losses": losses, "experts": chosen}


@contextlib.contextmanager
def _routed(model: Sequence[Any], experts: list[list[int]] | None) -> Iterator[list[list[int]]]:
    """Make every router choose the given experts, if any. Yield the list of experts that the routers chose."""
    chosen: list[list[int]] = []
    from minimind_mcore.models.moe import MiniMindRouter

    routers: list[Any] = [module for module in model[0].modules() if isinstance(module, MiniMindRouter)]
    hooks = [
        router.register_forward_hook(lambda *call: chosen.append(_true_positions(call[2][1]))) for router in routers
    ]
    for router, given in zip(routers, experts or [], strict=False):
        router.gating = functools.partial(_only, router.gating, given)
    try:
        yield chosen
    finally:
        for hook in hooks:
            hook.remove()
        for router in routers:
            vars(router).pop("gating", None)


def _true_positions(routing_map: Any) -> list[int]:
    found: list[int] = routing_map.flatten().nonzero().flatten().tolist()
    return found


def _only(gating: Callable[[Any], Any], chosen: list[int], hidden: Any) -> Any:
    """Return the router's logits, -inf for all experts that are not in `chosen`."""
    import torch

    logits = gating(hidden)
    kept = torch.zeros(logits.numel(), dtype=torch.bool, device=logits.device)
    kept[chosen] = True
    return logits.masked_fill(~kept.view_as(logits), -math.inf)


def _disturb(model: Sequence[Any], size: float) -> None:
    import torch

    numbers = torch.Generator().manual_seed(99)
    with torch.no_grad():
        for chunk in model:
            for parameter in chunk.parameters():
                change = torch.randn(parameter.shape, generator=numbers).to(parameter.device, parameter.dtype)
                parameter.mul_(1 + size * change)


def difference(found: dict[str, Any], expected: dict[str, Any], key: str) -> float:
    """Return the relative difference: the largest one for losses, ||found - expected|| / ||expected|| for logits."""
    pairs = list(zip(found[key], expected[key], strict=True))
    if not all(math.isfinite(a) for a, _ in pairs):
        return math.nan  # `max` ignores NaN
    if key == "losses":
        return max(abs(a - b) / abs(b) for a, b in pairs)
    return math.sqrt(sum((a - b) ** 2 for a, b in pairs) / sum(b * b for _, b in pairs))


def compare(names: Sequence[str], dtypes: Sequence[str]) -> None:
    recorded = json.loads(FILE.read_text(encoding="utf-8"))["presets"]
    for name in names:
        for dtype in dtypes:
            bf16, expected = dtype == "bf16", recorded[name]
            found = results(name, bf16, expected["seed"], experts=expected["experts"] if bf16 else None)
            allowed = TOLERANCES[dtype]
            for key in ("logits", "losses"):
                apart = difference(found, expected, key)
                note = f"relative difference; at most {allowed:g}"
                emit(f"{name}, {dtype}: {key}", apart, ok=apart <= allowed, note=note)  # NaN fails


def record() -> None:
    import torch

    body: dict[str, Any] = {}
    for name in PRESETS:
        for seed in range(1, 50):
            found = results(name, False, seed)
            moved = results(name, False, seed, noise=1e-6)
            if max(difference(moved, found, key) for key in ("logits", "losses")) < STABLE:
                break
        else:
            raise SystemExit(f"{name}: no seed up to 49 is stable")
        numbers = {key: [float(f"{x:.8g}") for x in found[key]] for key in ("logits", "losses")}
        body[name] = {"seed": seed, **numbers, "experts": found["experts"]}
        print(f"{name}: seed {seed}", flush=True)
    facts = {"by": "python -m gpu_check.presets --record (PYTHONPATH=benchmarks:.)", "torch": torch.__version__}
    FILE.write_text(json.dumps(facts | {"presets": body}) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presets", nargs="+", choices=PRESETS, default=list(PRESETS))
    parser.add_argument("--dtypes", nargs="+", choices=tuple(TOLERANCES), default=list(TOLERANCES))
    parser.add_argument("--record", action="store_true", help="compute the recorded values again on the CPU")
    parser.add_argument("--tiny", action="store_true", help="has no effect: the sizes are small anyway")
    args = parser.parse_args()
    from minimind_mcore.platform import device

    found = device.setup()
    if args.record:
        if found.kind != "cpu":
            sys.exit("--record: the values must be computed on a CPU; set DEVICE=cpu")
        record()
    else:
        compare(args.presets, args.dtypes)


if __name__ == "__main__":
    main()
