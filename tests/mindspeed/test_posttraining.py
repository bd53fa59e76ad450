"""Full fine-tuning, LoRA and DPO through MindSpeed-LLM equal the native engine on the same command line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from helpers import engine, rehearsal
from helpers.engine import worst_difference
from helpers.rehearsal import Inputs

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

STAGES: dict[str, tuple[str, dict[str, int]]] = {
    "sft": ("tune_minimind_full_ptd.sh", {}),
    "sft TP2": ("tune_minimind_full_ptd.sh", {"tp": 2}),
    "sft PP2": ("tune_minimind_full_ptd.sh", {"pp": 2}),
    "sft packed": ("tune_minimind_full_ptd.sh", {}),
    "lora": ("tune_minimind_lora_ptd.sh", {}),
    "lora packed": ("tune_minimind_lora_ptd.sh", {}),
    "dpo": ("dpo_minimind_ptd.sh", {}),
}


def settings(stage: str, inputs: Inputs, weights: Callable[..., Path]) -> dict[str, str]:
    """Of a stage's script, with its data converted."""
    _, parallel = STAGES[stage]
    kind, data = ("pairwise", "pairs.jsonl") if stage == "dpo" else ("instruction", "chats.jsonl")
    environment = rehearsal.SETTINGS | inputs.environment | rehearsal.layout(**parallel)
    environment |= {"MODEL": str(inputs.model("minimind3")), "DATA_PATH": str(inputs.folder / data)}
    environment |= {"SEQ_LENGTH": "128", "LR": "1e-3", "CKPT_LOAD_DIR": str(weights("minimind3", **parallel))}
    packing = []
    if stage.endswith("packed"):
        environment |= {"PACK": "1", "MBS": "1"}  # D9
        packing = ["--pack", "--neat-pack"]
    made = rehearsal.run_script(f"data_convert_minimind_{kind}.sh", *packing, rehearse=False, **environment)
    return environment | {
        "DATA_PATH": next(line for line in reversed(made.output.splitlines()) if line.startswith("/"))
    }


@pytest.mark.parametrize("stage", STAGES)
def test_losses_are_the_native_engines(
    stage: str, inputs: Inputs, weights: Callable[..., Path], server: engine.Server, tmp_path: Path
) -> None:
    script, parallel = STAGES[stage]
    environment = settings(stage, inputs, weights) | {"OUTPUT_DIR": str(tmp_path / "theirs")}
    adapters = []
    if stage.startswith("lora"):  # each would draw its own
        planned = rehearsal.program_flags(rehearsal.run_script(script, "--dry-run", **environment))
        adapters = ["--finetune", "--lora-load", str(first_adapters(planned, server, tmp_path))]
    theirs = rehearsal.run_script(script, *adapters, **environment)
    flags = rehearsal.drop(rehearsal.program_flags(theirs), "--load", "--save")
    flags += ["--save", str(tmp_path / "checkpoints")]
    ours = server.run(flags, tmp_path / "run", rehearsal.processes(**parallel), posttrain=True)
    assert theirs.iterations == list(range(1, 11))
    assert worst_difference(ours.column(), theirs.losses) < 1e-5  # 1e-4 is promised
    assert worst_difference(ours.column("grad_norm"), theirs.grad_norms) < 1e-3


@pytest.mark.parametrize("stage", ["sft", "lora", "dpo"])
def test_an_interrupted_tuning_goes_on(
    stage: str, inputs: Inputs, weights: Callable[..., Path], tmp_path: Path
) -> None:
    script, _ = STAGES[stage]
    environment = settings(stage, inputs, weights) | {"SAVE_INTERVAL": "5"}
    whole = rehearsal.run_script(script, **environment, OUTPUT_DIR=str(tmp_path / "whole"))
    rehearsal.halfway(tmp_path / "whole" / "checkpoints", tmp_path / "cut" / "checkpoints")
    resumed = rehearsal.run_script(script, **environment, OUTPUT_DIR=str(tmp_path / "cut"))
    assert resumed.iterations == [6, 7, 8, 9, 10]
    assert worst_difference(resumed.losses, whole.losses[5:]) < 1e-6


def first_adapters(flags: list[str], server: engine.Server, folder: Path) -> Path:
    """Adapters of the native engine after an update with a learning rate of 1e-3, so that both factors count."""
    changes = engine.as_flags({"train_iters": 1, "lr": 1e-3, "min_lr": 0.0, "save": folder / "adapters"})
    kept = rehearsal.drop(flags, "--train-iters", "--lr", "--min-lr", "--save", "--load")
    server.run([*kept, *changes], folder / "first", posttrain=True)
    return folder / "adapters"
