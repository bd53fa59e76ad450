"""A checkpoint that either engine saves is resumed by the other: weights, Adam's state, place in the schedule."""

from __future__ import annotations

from pathlib import Path

import engine
import pytest
import rehearsal
from engine import worst_difference
from rehearsal import Pretrain

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

# bf16 rounds intermediate results in other places; a lost moment or a wrong rate shows in the third digit.
BOUNDS = {"fp32": 1e-5, "bf16": 2e-3}


def native_flags(theirs: rehearsal.Result, **changes: object) -> list[str]:
    """The rehearsal's command line, loading and saving elsewhere."""
    return [
        *rehearsal.drop(rehearsal.program_flags(theirs), "--load", "--save", "--finetune"),
        *engine.as_flags(changes),
    ]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_native_goes_on_from_mindspeed_llm(
    precision: str, pretrain: Pretrain, server: engine.Server, tmp_path: Path
) -> None:
    theirs, checkpoints = pretrain("minimind3", precision=precision)
    assert ("--use-distributed-optimizer" in rehearsal.program_flags(theirs)) == (precision == "bf16")
    flags = native_flags(theirs, load=rehearsal.halfway(checkpoints, tmp_path / "half"), save=tmp_path / "saved")
    ours = server.run(flags, tmp_path / "run")
    assert ours.column("iteration") == [6, 7, 8, 9, 10]
    assert worst_difference(ours.column(), theirs.losses[5:]) < BOUNDS[precision]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_mindspeed_llm_goes_on_from_native(
    precision: str, pretrain: Pretrain, server: engine.Server, tmp_path: Path
) -> None:
    theirs, _ = pretrain("minimind3", precision=precision)
    start = rehearsal.value(rehearsal.program_flags(theirs), "--load")
    flags = native_flags(theirs, load=start, finetune=True, save=tmp_path / "saved")
    ours = server.run(flags, tmp_path / "run")
    resumed, _ = pretrain(
        "minimind3", precision=precision, load=rehearsal.halfway(tmp_path / "saved", tmp_path / "half")
    )
    assert resumed.iterations == [6, 7, 8, 9, 10]
    assert worst_difference(resumed.losses, ours.column()[5:]) < BOUNDS[precision]
