"""A run that resumes with another command line: what follows the command line, what follows the checkpoint."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from engine import Corpus, Run, Server, as_flags, layout, load

from minimind_mcore.models.presets import PRESETS

CONFIG = PRESETS["minimind3_tiny"]


def cosine(iteration: int, warmup: int, decay: int, highest: float, lowest: float) -> float:
    """Megatron's schedule: the learning rate of an iteration, which has `iteration - 1` before it."""
    done = iteration - 1
    if done <= warmup and warmup:
        return highest * done / warmup
    return lowest + (highest - lowest) * 0.5 * (math.cos(math.pi * (done - warmup) / (decay - warmup)) + 1)


def rates(run: Run) -> list[float]:
    return run.column("learning_rate")


LAYOUTS: dict[str, tuple[int, dict[str, Any], bool]] = {
    "torch": (1, {"ckpt_format": "torch"}, False),
    "torch DP2 distributed optimizer": (2, layout(use_distributed_optimizer=True, ckpt_format="torch"), False),
    "torch_dist bf16": (1, {"ckpt_format": "torch_dist", "bf16": True}, False),
    "torch_dist DP2 distributed optimizer": (
        2,
        layout(use_distributed_optimizer=True, ckpt_format="torch_dist"),
        False,
    ),
    "sft": (1, {"ckpt_format": "torch"}, True),
}


def check_override(server: Server, corpus: Corpus, dialogues: Corpus, tmp_path: Path, name: str) -> None:
    """Maximum, minimum, warmup, length and weight decay are all others than the checkpoint's."""
    processes, flags, posttrain = LAYOUTS[name]
    source = dialogues if posttrain else corpus
    stage = {"stage": "sft", "no_pad_to_seq_lengths": True} if posttrain else {}
    argv = source.flags(CONFIG, **{"train_iters": 8, "weight_decay": 0.1, **flags, **stage})
    place = {"save": tmp_path / "saved", "exit_interval": 4}
    server.run([*argv, *as_flags(place)], tmp_path / "first", processes, posttrain=posttrain)
    changes = {"train_iters": 12, "lr": 1e-4, "min_lr": 1e-5, "lr_warmup_iters": 6, "weight_decay": 0.3}
    argv = source.flags(CONFIG, **{**flags, **stage, **changes})
    place = {"load": tmp_path / "saved", "save": tmp_path / "second"}
    resumed = [*argv, *as_flags(place), "--override-opt_param-scheduler"]
    run = server.run(resumed, tmp_path / "run", processes, posttrain=posttrain)
    assert rates(run) == pytest.approx([cosine(i, 6, 12, 1e-4, 1e-5) for i in range(5, 13)], rel=1e-6)
    if flags["ckpt_format"] == "torch":
        state = load(tmp_path / "second/iter_0000012/mp_rank_00/model_optim_rng.pt")
        groups = state["optimizer"].get("optimizer", state["optimizer"])["param_groups"]
        assert {group["weight_decay"] for group in groups} == {0.0, 0.3}  # norms have none
        assert {group["max_lr"] for group in groups} == {1e-4}


@pytest.mark.parametrize("name", LAYOUTS)
def test_an_overridden_schedule_is_the_command_lines(
    server: Server, corpus: Corpus, dialogues: Corpus, tmp_path: Path, name: str
) -> None:
    check_override(server, corpus, dialogues, tmp_path, name)


def test_an_overridden_schedule_is_the_command_lines_on_core_012(
    server_012: Server, corpus: Corpus, dialogues: Corpus, tmp_path: Path
) -> None:
    check_override(server_012, corpus, dialogues, tmp_path, "torch")


def test_another_learning_rate_without_a_choice_is_refused_and_the_checkpoints_can_be_chosen(
    server: Server, corpus: Corpus, tmp_path: Path
) -> None:
    flags: dict[str, Any] = {"train_iters": 8, "ckpt_format": "torch"}
    first = corpus.flags(CONFIG, **flags, save=tmp_path / "saved", exit_interval=4)
    server.run(first, tmp_path / "first")
    argv = corpus.flags(CONFIG, **flags | {"lr": 5e-4}, load=tmp_path / "saved")
    run = server.run(argv, tmp_path / "refused", check=False)
    assert run.codes == [1] and "learning rate" in run.output and "--override-opt_param-scheduler" in run.output
    run = server.run([*argv, "--use-checkpoint-opt_param-scheduler"], tmp_path / "run")
    assert rates(run) == pytest.approx([cosine(i, 0, 8, 1e-3, 1e-4) for i in range(5, 9)], rel=1e-6)
