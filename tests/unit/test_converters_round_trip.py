"""There and back, bit for bit: every generation in every layout, dtype and form of its experts.

A cover of all pairs of settings runs by default, the whole grid under `-m slow`. Files are written and read
with safetensors and torch, not with the converters.
"""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.weights_on_disk import (
    MODELS,
    assert_same_bits,
    pairwise,
    read_hf,
    read_mcore,
    state_dict,
    whole_grid,
    write_hf,
)

from minimind_mcore.checkpoint.layout import ParallelLayout
from minimind_mcore.checkpoint.opening import open_source
from minimind_mcore.converters.convert import convert
from minimind_mcore.converters.hf import HFTarget
from minimind_mcore.converters.megatron import MegatronTarget

GRID = {
    "model": list(MODELS),
    "tp": [1, 2, 4],
    "pp": [1, 2, 4],
    "per_virtual_stage": [None, 1, 2],
    "ep": [1, 2, 4],
    "tied": [True, False],
    "grouped": [False, True],
    "dtype": [torch.float32, torch.bfloat16, torch.float16],
}


def valid(model: str, pp: int, per_virtual_stage: int | None, ep: int, grouped: bool, **_: Any) -> bool:
    moe = MODELS[model].moe is not None
    interleaved = per_virtual_stage is None or (pp > 1 and per_virtual_stage < 8 // pp)
    return interleaved and (moe or (ep == 1 and not grouped))


PAIRS = pairwise(GRID, valid)


def name_of(case: dict[str, Any]) -> str:
    return "-".join(f"{key}={str(value).removeprefix('torch.')}" for key, value in case.items())


def sharding_of(case: dict[str, Any]) -> ParallelLayout:
    return ParallelLayout(
        tp=case["tp"],
        pp=case["pp"],
        ep=case["ep"],
        layers_per_virtual_stage=case["per_virtual_stage"],
        grouped_experts=case["grouped"],
    )


def to_mcore(source: Path, layout: ParallelLayout, output: Path) -> Path:
    opened = open_source(source)
    return convert(opened, MegatronTarget(opened, layout), output).path


def to_hf(source: Path, output: Path) -> Path:
    opened = open_source(source)
    return convert(opened, HFTarget(opened, native=False, folder=None), output).path


def check_round_trip(case: dict[str, Any], other: dict[str, Any], folder: Path) -> None:
    config = MODELS[case["model"]].replace(tie_embeddings=case["tied"])
    state = state_dict(config, "hf", case["dtype"])
    hf = write_hf(folder / "hf", config, state)
    mcore = to_mcore(hf, sharding_of(case), folder / "mcore")
    assert open_source(mcore).config == open_source(hf).config
    assert_same_bits(read_hf(to_hf(mcore, folder / "back")), state)
    elsewhere = to_mcore(mcore, sharding_of(other), folder / "elsewhere")
    again = to_mcore(elsewhere, sharding_of(case), folder / "again")
    assert_same_bits(read_mcore(again), read_mcore(mcore))


def partner(case: dict[str, Any], cases: list[dict[str, Any]]) -> dict[str, Any]:
    """Another layout for the same kind of model."""
    alike = [c for c in cases if (MODELS[c["model"]].moe is None) == (MODELS[case["model"]].moe is None)]
    return alike[(alike.index(case) + len(alike) // 2) % len(alike)]


@pytest.mark.parametrize("case", PAIRS, ids=name_of)
def test_round_trip_is_bitwise(case: dict[str, Any], tmp_path: Path) -> None:
    check_round_trip(case, partner(case, PAIRS), tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(4 * 3600)  # hundreds of cases of five conversions; faster with --basetemp on a tmpfs
@pytest.mark.parametrize("model", MODELS)
def test_round_trip_is_bitwise_in_the_whole_grid(model: str, tmp_path: Path) -> None:
    cases = list(whole_grid(GRID, valid))
    for case in (case for case in cases if case["model"] == model):
        check_round_trip(case, partner(case, cases), tmp_path / "case")
        shutil.rmtree(tmp_path / "case")


def test_pairs_cover_the_grid() -> None:
    def pairs(cases: list[dict[str, Any]]) -> set[Any]:
        return {p for c in cases for p in itertools.combinations([(k, str(v)) for k, v in c.items()], 2)}

    assert pairs(PAIRS) == pairs(list(whole_grid(GRID, valid)))
    assert len(PAIRS) < 40


@pytest.mark.parametrize(
    "layout",
    [
        ParallelLayout(tp=2, pp=2, layers_per_stage=(3, 5)),
        ParallelLayout(pp=3, layers_per_stage=(1, 6, 1)),
        ParallelLayout(tp=2, pp=3, noop_layers=(8,)),
        ParallelLayout(pp=4, noop_layers=(0, 1, 2, 11)),
        ParallelLayout(pp=2, layers_per_virtual_stage=3, noop_layers=(0, 5, 6, 11)),
    ],
    ids=str,
)
@pytest.mark.parametrize("model", ["minimind3", "minimind2_moe"])
def test_uneven_pipelines_round_trip(model: str, layout: ParallelLayout, tmp_path: Path) -> None:
    state = state_dict(MODELS[model], "hf")
    hf = write_hf(tmp_path / "hf", MODELS[model], state)
    mcore = to_mcore(hf, layout, tmp_path / "mcore")
    assert open_source(mcore).layout == layout
    assert_same_bits(read_hf(to_hf(mcore, tmp_path / "back")), state)
    even = to_mcore(mcore, ParallelLayout(pp=2), tmp_path / "even")
    assert_same_bits(read_mcore(to_mcore(even, layout, tmp_path / "again")), read_mcore(mcore))


def test_the_digest_of_the_weights_is_that_of_no_format(tmp_path: Path) -> None:
    config = MODELS["minimind2_moe"]
    source = open_source(write_hf(tmp_path / "hf", config, state_dict(config, "hf")))
    first = convert(
        source, MegatronTarget(source, ParallelLayout(tp=2, ep=2, grouped_experts=True)), tmp_path / "mcore"
    )
    mcore = open_source(first.path)
    second = convert(mcore, HFTarget(mcore, native=True, folder=None), tmp_path / "native")
    other = open_source(write_hf(tmp_path / "other", config, state_dict(config, "hf", seed=2)))
    third = convert(other, MegatronTarget(other, ParallelLayout()), tmp_path / "third")
    assert first.digest == second.digest != third.digest
