"""Damaged inputs of every kind are refused: no traceback, no hang, a sentence that names the input."""

from __future__ import annotations

import os
import random
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from helpers import fuzz, fuzz_files, fuzz_texts

MAKERS: dict[str, Callable[[random.Random, Path], Iterator[fuzz.Case]]] = {
    "flags": fuzz_texts.flag_cases,
    "config.json": fuzz_texts.config_cases,
    "safetensors": fuzz_files.safetensors_cases,
    "pth": fuzz_files.pth_cases,
    "idx": fuzz_files.idx_cases,
    "tokenizer.json": fuzz_files.tokenizer_cases,
    "yaml": fuzz_texts.yaml_cases,
    "manifest": fuzz_texts.manifest_cases,
    "tracker": fuzz_texts.tracker_cases,
}
# Cases that are accepted, each with the reason.
ACCEPTED: dict[str, str] = {}


def run(kind: str, seed: int, most: int | None, folder: Path) -> Counter[str]:
    """Judge the cases of a kind, `most` of them; returns how many had which verdict."""
    rng = random.Random(seed)
    cases = list(MAKERS[kind](rng, folder))
    if most is not None and len(cases) > most:
        cases = rng.sample(cases, most)
    outcomes = [fuzz.judge(case) for case in cases]
    bad = [o for o in outcomes if o.verdict != fuzz.REFUSED and not listed(o)]
    counts = Counter("listed" if listed(o) else o.verdict for o in outcomes)
    if report := os.environ.get("FUZZ_REPORT"):
        with open(report, "a", encoding="utf-8") as file:
            file.write(f"{kind}: {len(cases)} inputs, {dict(counts)}\n" + "".join(f"    {o}\n" for o in bad))
    assert not bad, f"{len(bad)} of {len(cases)}:\n" + "\n".join(map(str, bad[:20]))
    return counts


def listed(outcome: fuzz.Outcome) -> bool:
    """Whether a case is accepted for a reason in the list."""
    return outcome.verdict == fuzz.ACCEPTED and f"{outcome.case.kind}: {outcome.case.name}" in ACCEPTED


@pytest.mark.parametrize("kind", MAKERS)
def test_some_damaged_inputs(kind: str, tmp_path: Path) -> None:
    run(kind, seed=1, most=60, folder=tmp_path)


@pytest.mark.slow
def test_all_damaged_inputs(tmp_path: Path) -> None:
    counts: Counter[str] = Counter()
    for kind in MAKERS:
        (tmp_path / kind).mkdir()
        counts += run(kind, seed=2, most=None, folder=tmp_path / kind)
    assert sum(counts.values()) >= 700 and len(ACCEPTED) <= 20, counts
