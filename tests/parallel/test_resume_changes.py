"""A run that resumes with another command line: what follows the command line, what follows the checkpoint."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import posttrain_oracle
from helpers.engine import ROOT, TRACKER, Corpus, Run, Server, as_flags, facts, layout, load, same

from minimind_mcore.models.presets import PRESETS
from minimind_mcore.preprocess.indexed import IndexedWriter

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


# The order of samples

WARNING = "reads its samples in another order"
NAMED: dict[str, tuple[dict[str, Any], str]] = {
    "seed": ({"seed": 7}, "--seed is 1234 there and 7 here"),
    "sequence length": ({"seq_length": 16}, "--seq-length is 32 there and 16 here"),
    "split": ({"split": "50,50,0"}, "--split is 1,0,0 there and 0.5,0.5,0 here"),
    "none": ({}, ""),
    "spelling of the split": ({"split": "100/0"}, ""),
    "batch within the epoch": ({"global_batch_size": 16}, ""),
}


@pytest.mark.parametrize("form", ["torch", "torch_dist"])
def test_another_sample_order_is_one_warning_with_both_values(
    server: Server, corpus: Corpus, tmp_path: Path, form: str
) -> None:
    start = {"train_iters": 8, "ckpt_format": form}
    flags = start | {"save": tmp_path / "saved", "exit_interval": 4}
    server.run(corpus.flags(CONFIG, **flags), tmp_path / "first")
    for name, (changes, message) in NAMED.items() if form == "torch" else [("seed", NAMED["seed"])]:
        argv = corpus.flags(CONFIG, **start | changes, load=tmp_path / "saved", exit_interval=5)
        run = server.run([*argv, "--override-opt_param-scheduler"], tmp_path / "second")
        assert run.output.count(WARNING) == bool(message) and message in run.output, (name, run.output)
        assert run.column("iteration") == [5]


def other_data(corpus: Corpus, folder: Path) -> Path:
    """A dataset of as many documents as the corpus, of other lengths."""
    numbers = np.random.default_rng(11)
    lengths = numbers.integers(20, 120, size=600)
    with IndexedWriter(folder / "other_text_document") as writer:
        writer.add(numbers.integers(40, corpus.vocab_size, size=lengths.sum()), lengths)
    return folder / "other_text_document"


def test_other_data_and_a_run_over_other_epochs_are_said(server: Server, corpus: Corpus, tmp_path: Path) -> None:
    copied = tmp_path / "moved_text_document"
    for kind in (".bin", ".idx"):
        copied.with_suffix(kind).write_bytes(corpus.prefix.with_suffix(kind).read_bytes())
    start = {"train_iters": 40, "global_batch_size": 16, "data_path": copied, "data_cache_path": tmp_path / "cache"}
    start |= {"ckpt_format": "torch", "seq_length": 16}
    server.run(corpus.flags(CONFIG, **start, save=tmp_path / "saved", exit_interval=2), tmp_path / "first")
    other = other_data(corpus, tmp_path)
    for changes, message in (
        ({"data_path": corpus.prefix}, ""),  # the same data at another path
        ({"data_path": other}, f"--data-path is {copied} (digest"),
        ({"train_iters": 50}, ""),  # 800 of 2,600 samples
        ({"train_iters": 400}, "--global-batch-size is 640 samples there and 6400 here, which are several epochs"),
    ):
        argv = corpus.flags(CONFIG, **start | changes, load=tmp_path / "saved", exit_interval=3)
        run = server.run([*argv, "--override-opt_param-scheduler"], tmp_path / "second")
        assert run.output.count(WARNING) == bool(message) and message in run.output, (changes, run.output)


def test_post_training_says_so_too(server: Server, dialogues: Corpus, tmp_path: Path) -> None:
    start = {"train_iters": 8, "ckpt_format": "torch", "stage": "sft", "no_pad_to_seq_lengths": True}
    flags = start | {"save": tmp_path / "saved", "exit_interval": 4}
    server.run(dialogues.flags(CONFIG, **flags), tmp_path / "first", posttrain=True)
    for changes, message in (
        ({"seed": 7}, "--seed is 1234 there and 7 here"),
        ({"no_shuffle": True}, "--no-shuffle is False there and True here"),
        ({"seq_length": 24}, ""),  # cuts conversations, and does not move them
    ):
        argv = dialogues.flags(CONFIG, **start | changes, load=tmp_path / "saved", exit_interval=5)
        run = server.run(argv, tmp_path / "second", posttrain=True)
        assert run.output.count(WARNING) == bool(message) and message in run.output, (changes, run.output)


# fp16

FP16: dict[str, tuple[int, dict[str, Any]]] = {
    "torch": (1, {"ckpt_format": "torch"}),
    "torch DP2 distributed optimizer": (2, layout(use_distributed_optimizer=True, ckpt_format="torch")),
    "torch_dist DP2 distributed optimizer": (2, layout(use_distributed_optimizer=True, ckpt_format="torch_dist")),
}


def check_fp16(server: Server, corpus: Corpus, folder: Path, name: str) -> None:
    """The loss scale is halved in every step of the first half, and fits in the second."""
    processes, flags = FP16[name]
    argv = corpus.flags(
        CONFIG, **{"train_iters": 8, "fp16": True, "initial_loss_scale": 2.0**24, **flags}, hysteresis=1
    )
    straight = server.run([*argv, *as_flags({"save": folder / "a", "save_interval": 4})], folder / "one", processes)
    skipped = straight.column("skipped_iterations")
    assert skipped[3] == 4 and skipped[7] < 8
    file = "iter_0000004/mp_rank_00/model_optim_rng.pt"
    if flags["ckpt_format"] == "torch" and processes == 1:
        moments = load(folder / "a" / file)["optimizer"]["optimizer"]["state"]
        assert moments and all(not values["exp_avg"].any() for values in moments.values())
    (folder / "a" / TRACKER).write_text("4")
    resumed = server.run([*argv, *as_flags({"load": folder / "a", "save": folder / "b"})], folder / "two", processes)
    assert facts(resumed) == [row for row in facts(straight) if row["iteration"] > 4]
    for file in sorted((folder / "a/iter_0000008").rglob("*.pt")):
        assert same(load(file), load(folder / "b" / file.relative_to(folder / "a"))), file


@pytest.mark.parametrize("name", FP16)
def test_a_save_before_the_first_applied_step_resumes_exactly(
    server: Server, corpus: Corpus, tmp_path: Path, name: str
) -> None:
    check_fp16(server, corpus, tmp_path, name)


def test_a_save_before_the_first_applied_step_resumes_exactly_on_core_012(
    server_012: Server, corpus: Corpus, tmp_path: Path
) -> None:
    check_fp16(server_012, corpus, tmp_path, "torch DP2 distributed optimizer")


# Converted weights


def convert(source: Path, target: Path, form: str) -> Path:
    """Convert a Megatron checkpoint by the command line; megatron-core's groups are global to a process."""
    flags = ["--load-model-type", "mg", "--save-model-type", "mg", "--ckpt-format", form]
    command = [sys.executable, ROOT / "convert_ckpt_v2.py", *flags, "--load-dir", source, "--save-dir", target]
    subprocess.run(command, check=True, env=os.environ | {"PYTHONPATH": str(ROOT)}, timeout=200)
    return target


@pytest.mark.parametrize("form", ["torch", "torch_dist"])
def test_converted_weights_begin_at_iteration_0_with_sample_0(
    server: Server, corpus: Corpus, tmp_path: Path, form: str
) -> None:
    flags: dict[str, Any] = {"train_iters": 3, "ckpt_format": "torch"}
    server.run(corpus.flags(CONFIG, **flags, save=tmp_path / "trained"), tmp_path / "first")
    converted = convert(tmp_path / "trained", tmp_path / "converted", form)
    flags |= {"ckpt_format": form, "load": converted}
    expected: list[dict[str, Any]] = []
    for more in ({"finetune": True}, {}, {"no_load_optim": True, "no_load_rng": True}):
        argv = corpus.flags(CONFIG, **flags, **more)
        dry = server.run([*argv, "--dry-run"], tmp_path / "dry")
        assert f"load:       {converted}" in dry.output
        run = server.run(argv, tmp_path / "run")
        expected = expected or facts(run)
        assert facts(run) == expected and run.column("iteration") == [1, 2, 3]
        assert run.column("consumed_samples") == [8, 16, 24]
        assert ("training starts at iteration 0" in run.output) == ("finetune" not in more)


def test_post_training_begins_with_converted_weights_and_takes_them_as_the_reference(
    server: Server, dialogues: Corpus, start: Path, tmp_path: Path
) -> None:
    model = PRESETS[posttrain_oracle.MODEL]
    converted = convert(start, tmp_path / "converted", "torch")
    flags = posttrain_oracle.FLAGS | {"train_iters": 1, "seq_length": 32, "stage": "dpo", "load": converted}
    pairs = {"data_path": dialogues.prefix.with_name("pairs"), "is_pairwise_dataset": True, "ckpt_format": "torch"}
    run = server.run(dialogues.flags(model, **flags | pairs), tmp_path / "run", posttrain=True)
    assert run.column("iteration") == [1] and run.column()[0] == pytest.approx(math.log(2), rel=1e-5)


def test_a_dry_run_refuses_what_the_run_refuses(server: Server, corpus: Corpus, tmp_path: Path) -> None:
    start = {"train_iters": 2, "ckpt_format": "torch_dist"}
    server.run(corpus.flags(CONFIG, **start, save=tmp_path / "saved"), tmp_path / "first")
    for changes, message in (
        ({"lr": 5e-4}, "its learning-rate schedule differs from the command line"),
        ({"use_distributed_optimizer": True}, "saved without --use-distributed-optimizer"),
        ({"lr": 5e-4, "no_load_optim": True}, ""),
        ({"no_load_rng": True}, ""),
    ):
        argv = corpus.flags(CONFIG, **start | changes, load=tmp_path / "saved")
        for words in ([*argv, "--dry-run"], argv):
            run = server.run(words, tmp_path / "second", check=False)
            assert run.codes == [bool(message)] and message in run.output, (words, run.output)


@pytest.mark.parametrize("form", ["torch", "torch_dist"])
def test_a_run_that_saves_weights_alone_keeps_its_place(
    server: Server, corpus: Corpus, tmp_path: Path, form: str
) -> None:
    flags: dict[str, Any] = {"train_iters": 4, "ckpt_format": form}
    first = {"save": tmp_path / "saved", "exit_interval": 2, "no_save_optim": True, "no_save_rng": True}
    server.run(corpus.flags(CONFIG, **flags, **first), tmp_path / "first")
    run = server.run(corpus.flags(CONFIG, **flags, load=tmp_path / "saved"), tmp_path / "second")
    assert run.column("iteration") == [3, 4] and run.column("consumed_samples") == [24, 32]
    assert rates(run) == pytest.approx([cosine(i, 0, 4, 1e-3, 1e-4) for i in (3, 4)], rel=1e-6)
    assert "holds no optimizer (--no-save-optim): Adam starts with zero moments" in run.output


def test_a_run_without_the_optimizer_of_its_checkpoint_keeps_its_place_in_the_schedule(
    server: Server, corpus: Corpus, tmp_path: Path
) -> None:
    flags: dict[str, Any] = {"train_iters": 4, "ckpt_format": "torch"}
    server.run(corpus.flags(CONFIG, **flags, save=tmp_path / "saved", exit_interval=2), tmp_path / "first")
    run = server.run(corpus.flags(CONFIG, **flags, load=tmp_path / "saved", no_load_optim=True), tmp_path / "second")
    assert rates(run) == pytest.approx([cosine(i, 0, 4, 1e-3, 1e-4) for i in (3, 4)], rel=1e-6)
    assert "--no-load-optim: Adam starts with zero moments" in run.output


@pytest.mark.parametrize("form", ["torch", "torch_dist"])
def test_other_constants_of_adam_are_one_warning_with_both_values(
    server: Server, corpus: Corpus, tmp_path: Path, form: str
) -> None:
    start: dict[str, Any] = {"train_iters": 4, "ckpt_format": form, "adam_beta1": 0.9, "adam_beta2": 0.999}
    server.run(corpus.flags(CONFIG, **start, save=tmp_path / "saved", exit_interval=2), tmp_path / "first")
    losses = []
    for changes, override, follows in (
        ({}, False, ""),
        ({"adam_beta2": 0.5}, False, "checkpoint; --override-opt_param-scheduler uses the command line"),
        ({"adam_beta2": 0.5}, True, "command line\n"),
        ({"adam_eps": 1e-3}, True, "command line\n"),
    ):
        argv = corpus.flags(CONFIG, **start | changes, load=tmp_path / "saved")
        argv += ["--override-opt_param-scheduler"] if override else []
        run = server.run(argv, tmp_path / "second")
        assert run.output.count("The run uses the") == bool(changes)
        assert f"The run uses the {follows}" in run.output or not changes
        assert "--adam-beta2 is 0.999 there and 0.5 here" in run.output or "adam_beta2" not in changes
        losses.append(run.column("grad_norm"))
    assert losses[0] == losses[1] and losses[2] != losses[0] and losses[3] != losses[0]
