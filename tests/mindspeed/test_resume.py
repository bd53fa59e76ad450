"""A checkpoint that either engine saves is resumed by the other: weights, Adam's state, place in the schedule."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import engine, rehearsal
from helpers.engine import worst_difference
from helpers.rehearsal import Inputs, Pretrain

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


def test_what_megatron_cannot_load_is_a_failure(pretrain: Pretrain, inputs: Inputs, tmp_path: Path) -> None:
    """Where it has no random states to go on from, it says so and exits with status 0."""
    _, checkpoints = pretrain("minimind3")
    source = rehearsal.halfway(checkpoints, tmp_path / "half")
    for file in source.glob("iter_*/mp_rank_*/model_optim_rng.pt"):
        state = torch.load(file, weights_only=False)
        del state["rng_state"]
        target = tmp_path / "cut" / file.relative_to(source)
        target.parent.mkdir(parents=True)
        torch.save(state, target)
    (tmp_path / "cut" / engine.TRACKER).write_text("5")
    environment = rehearsal.SETTINGS | inputs.environment | rehearsal.layout()
    environment |= {"MODEL": str(inputs.model("minimind3")), "DATA_PATH": str(inputs.folder / "text.jsonl")}
    environment |= {"OUTPUT_DIR": str(tmp_path / "out"), "CKPT_LOAD_DIR": str(tmp_path / "cut")}
    result = rehearsal.run_script("pretrain", check=False, **environment)
    assert "Unable to load rng state" in result.output and not result.iterations
    assert result.code == 1 and "could not load the checkpoint (see above); nothing was trained" in result.output
