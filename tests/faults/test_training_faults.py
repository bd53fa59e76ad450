"""What goes wrong in training is said by name, costs no finished checkpoint, and never hangs."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from helpers import chaos
from helpers.disks import small_disk
from helpers.engine import ROOT, Corpus, Run, Server, as_flags, facts, layout
from helpers.launcher import launched, ranks_of, wait_for_iteration

from minimind_mcore.models.presets import PRESETS

CONFIG = PRESETS["minimind2_small_tiny"]
FORMATS = ("torch", "torch_dist")
TRACKER = "latest_checkpointed_iteration.txt"


# Hooks: what is broken, inside a rank, before its run.


def kill_in_second_save() -> None:
    """SIGKILL of every rank when the files of the second save are written, but not yet published."""
    from minimind_mcore.training import checkpointing

    publish = checkpointing._publish

    def publish_or_die(*arguments: Any) -> None:
        if "0000004" in str(arguments[2]):
            os.killpg(os.getpgid(0), signal.SIGKILL) if os.environ.get("KILL_ALL") else os.kill(os.getpid(), 9)
        publish(*arguments)

    checkpointing._publish = publish_or_die


def kill_half_written() -> None:
    """SIGKILL while a file of the second save has half of its bytes."""
    import torch

    save = torch.save

    def save_half(state: Any, file: Any, *arguments: Any, **options: Any) -> None:
        save(state, file, *arguments, **options)
        if isinstance(state, dict) and state.get("iteration") == 4:
            with open(file, "r+b") as f:
                f.truncate(Path(file).stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    torch.save = save_half


def poison_third_step() -> None:
    """On rank 1, a weight becomes NaN before the third step."""
    from minimind_mcore.training import step

    train_step, calls = step.Engine.step, []

    def poisoned(self: Any, *rest: Any) -> Any:
        calls.append(0)
        if len(calls) == 3 and os.environ["RANK"] == "1":
            next(iter(self.model[0].parameters())).data.fill_(float("nan"))
        return train_step(self, *rest)

    step.Engine.step = poisoned  # type: ignore[method-assign]


def believe_in_space() -> None:
    """The check for free space before a save sees enough of it."""
    from minimind_mcore.training import checkpointing

    checkpointing._require_space = lambda *arguments: None


def hook(function: Callable[[], None]) -> str:
    """The hook's name for `Server.run`."""
    return f"{__file__}:{function.__name__}"


# Checkpoints


def saved_run(server: Server, corpus: Corpus, folder: Path, form: str, **changes: Any) -> Run:
    """Four steps, saved at 2 and 4."""
    flags = {"train_iters": 4, "save": folder / "saved", "save_interval": 2, "ckpt_format": form} | changes
    return server.run(corpus.flags(CONFIG, **flags), folder / "first")


def go_on(server: Server, corpus: Corpus, folder: Path, form: str, check: bool = True) -> Run:
    """Load what `saved_run` left, and train to 5."""
    flags = {"train_iters": 5, "load": folder / "saved", "ckpt_format": form}
    argv = [*corpus.flags(CONFIG, **flags), "--override-opt_param-scheduler"]
    return server.run(argv, folder / "second", check=check)


@pytest.fixture(params=FORMATS)
def form(request: pytest.FixtureRequest) -> str:
    """Both formats."""
    return str(request.param)


@pytest.mark.parametrize("killed", [kill_in_second_save, kill_half_written])
def test_kill_during_a_save_costs_nothing_finished(
    server: Server, corpus: Corpus, tmp_path: Path, form: str, killed: Callable[[], None]
) -> None:
    flags = {"train_iters": 4, "save": tmp_path / "saved", "save_interval": 2, "ckpt_format": form}
    run = server.run(corpus.flags(CONFIG, **flags), tmp_path / "first", hook=hook(killed), check=False)
    assert run.codes == [-signal.SIGKILL], run.output
    names = {p.name for p in (tmp_path / "saved").iterdir()}
    assert names == {TRACKER, "iter_0000002", ".iter_0000004.tmp"}
    flags |= {"load": tmp_path / "saved"}
    run = server.run(corpus.flags(CONFIG, **flags), tmp_path / "second")
    assert "iteration 2, 16 samples consumed" in run.output
    assert [row["iteration"] for row in run.rows] == [3, 4]
    assert {p.name for p in (tmp_path / "saved").iterdir()} == {TRACKER, "iter_0000002", "iter_0000004"}


def truncate(directory: Path) -> str:
    file = max(directory.rglob("*"), key=lambda p: p.stat().st_size if p.is_file() else 0)
    os.truncate(file, file.stat().st_size // 2)
    return rf"{re.escape(str(file))}: \d+ bytes, expected"


def flip_a_byte(directory: Path) -> str:
    file = max(directory.rglob("*"), key=lambda p: p.stat().st_size if p.is_file() else 0)
    with open(file, "r+b") as f:
        f.seek(file.stat().st_size // 2)
        byte = f.read(1)[0]
        f.seek(-1, os.SEEK_CUR)
        f.write(bytes([byte ^ 1]))
    return re.escape(str(file)) + ": content differs"


def delete_a_file(directory: Path) -> str:
    file = next(p for p in sorted(directory.rglob("*")) if p.is_file() and p.name != "manifest.json")
    file.unlink()
    return re.escape(str(file)) + ": missing"


def empty_tracker(directory: Path) -> str:
    (directory.parent / TRACKER).write_text("")
    return f"{TRACKER}: found '', expected an iteration"


def tracker_names_nothing(directory: Path) -> str:
    (directory.parent / TRACKER).write_text("9")
    return "iter_0000009 is damaged"


def tracker_names_nothing_older(directory: Path) -> str:
    (directory.parent / TRACKER).write_text("1")  # a "12" that lost its end looks like that
    return "iter_0000001 is damaged"


def test_damaged_checkpoints_are_named_and_the_newest_whole_one_loaded(
    server: Server, corpus: Corpus, tmp_path: Path, form: str
) -> None:
    damages: list[tuple[Callable[[Path], str], int]] = [
        (empty_tracker, 4), (tracker_names_nothing, 4), (tracker_names_nothing_older, 4), (truncate, 2),
    ]  # fmt: skip
    if form == "torch_dist":
        damages[-1] = (delete_a_file, 2)
    saved_run(server, corpus, tmp_path, form)
    for damage, expected in damages:
        message = damage(tmp_path / "saved" / "iter_0000004")
        run = go_on(server, corpus, tmp_path, form)
        assert re.search(message, run.output), (message, run.output)
        assert f"iteration {expected}, {expected * 8} samples" in run.output
    message = flip_a_byte(tmp_path / "saved" / "iter_0000002")
    run = go_on(server, corpus, tmp_path, form, check=False)
    assert run.codes == [1] and re.search(message, run.output), run.output
    assert "no whole checkpoint in" in run.output and "Traceback" not in run.output


@pytest.mark.parametrize("saved, given", [("adam", "sgd"), ("sgd", "adam"), ("sgd", "sgd")])
@pytest.mark.parametrize("dry", [False, True], ids=["run", "dry run"])
def test_another_optimizer_than_the_checkpoints_is_refused(
    server: Server, corpus: Corpus, tmp_path: Path, form: str, saved: str, given: str, dry: bool
) -> None:
    flags = {"train_iters": 2, "save": tmp_path / "saved", "ckpt_format": form, "lr_decay_style": "constant"}
    server.run(corpus.flags(CONFIG, **flags, optimizer=saved, exit_interval=1), tmp_path / "run")
    argv = corpus.flags(CONFIG, **flags, load=tmp_path / "saved", optimizer=given, dry_run=dry)
    run = server.run(argv, tmp_path / "run", check=False)
    assert "Traceback" not in run.output, run.output
    if saved == given:
        assert run.codes == [0], run.output
        whole = server.run(corpus.flags(CONFIG, **flags, optimizer=saved), tmp_path / "whole")
        assert dry or facts(run) == facts(whole)
        return
    message = f"saved with --optimizer {saved}, and the run has {given}; use the same setting, or give --no-load-optim"
    assert run.codes == [1] and message in run.output, run.output


@pytest.mark.parametrize("dry", [False, True], ids=["run", "dry run"])
def test_another_form_of_the_optimizer_is_refused(
    server: Server, corpus: Corpus, tmp_path: Path, form: str, dry: bool
) -> None:
    saved_run(server, corpus, tmp_path, form)
    flags = {"train_iters": 4, "load": tmp_path / "saved", "ckpt_format": form, "use_distributed_optimizer": True}
    run = server.run(corpus.flags(CONFIG, **flags, dry_run=dry), tmp_path / "run", check=False)
    assert run.codes == [1] and "saved without --use-distributed-optimizer" in run.output, run.output


def test_another_schedule_than_the_checkpoints_is_a_choice(server: Server, corpus: Corpus, tmp_path: Path) -> None:
    flags = {"train_iters": 2, "save": tmp_path / "saved", "ckpt_format": "torch"}
    server.run(corpus.flags(CONFIG, **flags), tmp_path / "first")
    argv = corpus.flags(CONFIG, train_iters=4, load=tmp_path / "saved")
    run = server.run(argv, tmp_path / "second", check=False)
    assert run.codes == [1] and "Traceback" not in run.output
    assert "--override-opt_param-scheduler to use the command line" in run.output, run.output
    ours = server.run([*argv, "--override-opt_param-scheduler"], tmp_path / "second").column("learning_rate")
    theirs = server.run([*argv, "--use-checkpoint-opt_param-scheduler"], tmp_path / "third").column("learning_rate")
    assert ours[0] > theirs[0] and theirs == [1e-4, 1e-4]


def test_missing_checkpoint_starts_anew_unless_told_otherwise(server: Server, corpus: Corpus, tmp_path: Path) -> None:
    flags = {"train_iters": 1, "load": tmp_path / "nothing"}
    run = server.run(corpus.flags(CONFIG, **flags), tmp_path / "run")
    assert f"no checkpoint in {tmp_path / 'nothing'}: starting from the beginning" in run.output
    argv = corpus.flags(CONFIG, **flags, exit_on_missing_checkpoint=True)
    run = server.run(argv, tmp_path / "run", check=False)
    assert run.codes == [1] and "found no checkpoint there" in run.output


def test_an_older_checkpoint_that_is_a_link_is_unlinked(server: Server, corpus: Corpus, tmp_path: Path) -> None:
    saved_run(server, corpus, tmp_path, "torch", train_iters=2, exit_interval=1)
    first = tmp_path / "saved" / "iter_0000001"
    first.rename(tmp_path / "elsewhere")
    first.symlink_to(tmp_path / "elsewhere")
    saved_run(server, corpus, tmp_path, "torch", train_iters=2, keep_last=1, load=tmp_path / "saved")
    assert [path.name for path in (tmp_path / "saved").glob("iter_*")] == ["iter_0000002"]
    assert list((tmp_path / "elsewhere").iterdir())


def test_keep_last_keeps_the_newest(server: Server, corpus: Corpus, tmp_path: Path) -> None:
    saved_run(server, corpus, tmp_path, "torch", train_iters=5, save_interval=1, keep_last=2)
    assert sorted(p.name for p in (tmp_path / "saved").iterdir()) == ["iter_0000004", "iter_0000005", TRACKER]


@pytest.mark.parametrize("broken", [None, hook(believe_in_space)], ids=["before writing", "while writing"])
def test_full_disk_ends_with_a_message_and_the_last_checkpoint_loads(
    server: Server, corpus: Corpus, tmp_path: Path, form: str, broken: str | None
) -> None:
    with small_disk(tmp_path / "saved", 5) as disk:  # a checkpoint takes between 2.6 and 3.5 MiB
        flags = {"train_iters": 4, "save": disk, "save_interval": 2, "ckpt_format": form, "keep_last": 1}
        argv = corpus.flags(CONFIG, **flags)
        run = server.run([*argv, *as_flags(layout(tp=2))], tmp_path / "first", 2, broken, check=False)
        assert 0 not in run.codes and run.seconds < 60
        assert re.search(r"disk full while writing \S+/saved/\.iter_0000004\.tmp", run.output), run.output
        assert "Traceback" not in run.output
        assert {p.name for p in disk.iterdir()} == {TRACKER, "iter_0000002"}
        flags |= {"exit_interval": 3, "load": disk, "save": None, "save_interval": None}
        run = server.run([*corpus.flags(CONFIG, **flags), *as_flags(layout(tp=2))], tmp_path / "second", 2)
        assert [row["iteration"] for row in run.rows] == [3]


@pytest.mark.parametrize(
    ("limit", "named"),
    [(40, "run"), (1000, r"cache/\S+"), (9000, r"run/metrics\.jsonl"), (200_000, r"\.iter_0000030\.tmp")],
    ids=["lock", "cache", "metrics", "checkpoint"],
)
def test_a_limit_on_the_size_of_files_is_one_sentence(
    server: Server, corpus: Corpus, tmp_path: Path, form: str, limit: int, named: str
) -> None:
    folders = {"save": tmp_path / "saved", "data_cache_path": tmp_path / "cache"}
    argv = corpus.flags(CONFIG, train_iters=30, ckpt_format=form, **folders)
    attempt = chaos.Served(server, argv, tmp_path / "run", 30, 1, None)
    attempt.start(limit)
    ended = attempt.finish()
    assert ended.codes == [1] and "Traceback" not in ended.output, ended.output
    assert re.search(
        rf"^error: file too large while writing \S*{named}: the limit is {limit} bytes", ended.output, re.M
    )
    assert not (tmp_path / "saved" / TRACKER).exists()


def test_metrics_on_a_full_disk_are_one_sentence(server: Server, corpus: Corpus, tmp_path: Path) -> None:
    with small_disk(tmp_path / "run", 0.02) as disk:
        attempt = chaos.Served(server, corpus.flags(CONFIG, train_iters=200), disk, 200, 1, None)
        attempt.start()
        ended = attempt.finish()
    assert ended.codes == [1] and "Traceback" not in ended.output, ended.output
    assert re.search(r"^error: disk full while writing \S*run/metrics\.jsonl: ", ended.output, re.M), ended.output


# Data and numbers


def test_truncated_data_is_refused_by_name(server: Server, corpus: Corpus, tmp_path: Path) -> None:
    for kind in (".bin", ".idx"):
        content = corpus.prefix.with_suffix(kind).read_bytes()
        (tmp_path / f"cut{kind}").write_bytes(content[: -100 if kind == ".bin" else None])
    run = server.run(corpus.flags(CONFIG, data_path=tmp_path / "cut"), tmp_path / "run", check=False)
    assert run.codes == [1] and f"{tmp_path / 'cut.bin'}: truncated" in run.output
    assert "Traceback" not in run.output


def sources_without_helpers() -> None:
    """megatron-core runs from its sources, whose C++ helpers are not compiled, and there is no compiler."""
    import importlib.util

    from megatron.core.datasets import utils

    find_spec = importlib.util.find_spec

    def compile_helpers() -> None:
        raise SystemExit(1)

    importlib.util.find_spec = lambda name, *rest: None if name.endswith("helpers_cpp") else find_spec(name, *rest)
    utils.compile_helpers = compile_helpers


def test_helpers_that_cannot_be_compiled_are_named(server: Server, corpus: Corpus, tmp_path: Path) -> None:
    run = server.run(corpus.flags(CONFIG), tmp_path / "run", 2, hook=hook(sources_without_helpers), check=False)
    assert run.codes == [1, 1] and "Install make, g++ and pybind11" in run.output and "Traceback" not in run.output


def test_loss_that_is_not_finite_stops_with_iteration_rank_and_samples(
    server: Server, corpus: Corpus, tmp_path: Path
) -> None:
    flags = {"train_iters": 4, "save": tmp_path / "saved", "save_interval": 2, "ckpt_format": "torch"}
    run = server.run(corpus.flags(CONFIG, **flags), tmp_path / "run", 2, hook=hook(poison_third_step), check=False)
    assert 0 not in run.codes and run.seconds < 60
    assert "iteration 3, rank 1, dataset indices [20, 21, 22, 23]: the loss is not finite" in run.output, run.output
    assert (tmp_path / "saved" / TRACKER).read_text() == "2"


def test_overflowing_weights_stop_the_run(server: Server, corpus: Corpus, tmp_path: Path) -> None:
    # the decay multiplies every weight by 1 - lr * weight_decay, about -1e6, in each step
    flags = {"train_iters": 12, "lr": 1000, "weight_decay": 1000, "min_lr": 0, "lr_decay_style": "constant"}
    run = server.run(corpus.flags(CONFIG, **flags), tmp_path / "run", check=False)
    assert run.codes == [1] and re.search(r"iteration \d, rank 0, dataset indices \[.*\]: the", run.output), run.output


def test_fp16_overflow_skips_the_step_and_halves_the_scale(server: Server, corpus: Corpus, tmp_path: Path) -> None:
    flags = {"fp16": True, "initial_loss_scale": 2.0**40, "hysteresis": 1, "train_iters": 30}
    run = server.run(corpus.flags(CONFIG, **flags), tmp_path / "run")
    skipped = run.column("skipped_iterations")
    assert 5 < skipped[-1] < 30 and skipped[-1] == skipped[-2]
    assert run.column("learning_rate")[0] == run.column("learning_rate")[5], "a skipped step does not move the schedule"


# The launcher, with its own processes


@pytest.mark.parametrize("torchrun", [False, True], ids=["launcher", "torchrun"])
def test_killed_rank_takes_the_job_down_with_a_message(torchrun: bool, corpus: Corpus, tmp_path: Path) -> None:
    flags = corpus.flags(CONFIG, train_iters=100000, **layout(tp=2))
    with launched(flags, tmp_path, torchrun=torchrun) as job:
        wait_for_iteration(job, 2)
        ranks = ranks_of(job)
        started = time.monotonic()
        ranks[1].kill()
        output, _ = job.communicate(timeout=60)
        assert time.monotonic() - started < 60
        assert job.returncode == 1
        assert "rank 1 ended with signal SIGKILL" in output and "the other ranks were stopped" in output, output
        psutil.wait_procs(ranks, timeout=5)
        assert not any(rank.is_running() for rank in ranks)


@pytest.mark.parametrize("torchrun", [False, True], ids=["launcher", "torchrun"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_saves_and_exits_in_order(
    torchrun: bool, corpus: Corpus, tmp_path: Path, number: signal.Signals
) -> None:
    flags = {"train_iters": 100000, "save": tmp_path / "saved", "ckpt_format": "torch", "data_path": corpus.prefix}
    with launched(corpus.flags(CONFIG, **flags), tmp_path, torchrun=torchrun) as job:
        wait_for_iteration(job, 2)
        os.killpg(job.pid, number) if number == signal.SIGINT else job.send_signal(number)
        output, _ = job.communicate(timeout=60)
    found = re.search(r"saved checkpoint of iteration (\d+)", output)
    assert found, output
    assert (tmp_path / "saved" / TRACKER).read_text() == found[1]
    assert f"stopped at iteration {found[1]} of 100000" in output and "Traceback" not in output, output
    assert job.returncode == 128 + number and f"stopped by {number.name}" in output


def stall_save() -> None:
    """A save that takes forever."""
    from minimind_mcore.training import checkpointing

    def stall(*arguments: Any) -> None:
        print("saving", flush=True)
        time.sleep(1000)

    checkpointing.save = stall


def test_second_signal_exits_at_once(corpus: Corpus, tmp_path: Path) -> None:
    flags = {"train_iters": 100000, "save": tmp_path / "saved", "ckpt_format": "torch"}
    argv = [*corpus.flags(CONFIG, **flags), "--output-dir", str(tmp_path)]
    program = (
        "import sys; sys.path[:0] = sys.argv[1:3]; del sys.argv[1:3]\n"
        "import test_training_faults\nfrom minimind_mcore import errors\nfrom minimind_mcore.training import pretrain\n"
        "test_training_faults.stall_save(); errors.run(pretrain.main)"
    )
    command = [sys.executable, "-c", program, str(Path(__file__).parent), str(ROOT / "tests"), *argv]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "DEVICE": "cpu", "PYTHONPATH": str(ROOT)}
    job = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        wait_for_iteration(job, 2)
        job.send_signal(signal.SIGTERM)
        assert job.stdout
        for line in job.stdout:
            if line == "saving\n":
                break
        job.send_signal(signal.SIGTERM)
        with pytest.raises(subprocess.TimeoutExpired):
            job.wait(timeout=1)  # within moments it is the same request
        time.sleep(2.5)
        job.send_signal(signal.SIGTERM)
        assert job.wait(timeout=2) == 128 + signal.SIGTERM
    finally:
        job.kill()
        job.wait()


def test_out_of_vocabulary_token_is_not_trained_on(server: Server, corpus: Corpus, tmp_path: Path) -> None:
    from minimind_mcore.preprocess.indexed import IndexedWriter

    with IndexedWriter(tmp_path / "bad") as writer:
        writer.add(np.full(4000, corpus.vocab_size + 5), np.array([4000]))
    run = server.run(corpus.flags(CONFIG, data_path=tmp_path / "bad", train_iters=1), tmp_path / "run", check=False)
    assert run.codes == [1], run.output
