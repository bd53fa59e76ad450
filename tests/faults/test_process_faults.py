"""Processes that die, stop or hang: each is named, the others do not wait for it, and nothing finished is lost."""

from __future__ import annotations

import fcntl
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from helpers.engine import ROOT, Corpus, Server, layout
from helpers.launcher import launched, ranks_of, wait_for_iteration

from minimind_mcore.models.presets import PRESETS

CONFIG = PRESETS["minimind2_small_tiny"]
TRACKER = "latest_checkpointed_iteration.txt"


def hook(function: Callable[[], None]) -> str:
    """The hook's name for `Server.run`."""
    return f"{__file__}:{function.__name__}"


def last_line(output: str) -> str:
    return output.strip().splitlines()[-1]


# One run at a time in a directory


def test_a_second_run_in_one_output_directory_is_refused(server: Server, corpus: Corpus, tmp_path: Path) -> None:
    flags = {"train_iters": 100000, "save": tmp_path / "saved", "save_interval": 1, "ckpt_format": "torch"}
    with launched(corpus.flags(CONFIG, **flags), tmp_path / "first", 1) as job:
        wait_for_iteration(job, 2)
        (rank,) = ranks_of(job)
        # another OUTPUT_DIR, but the same checkpoints
        run = server.run(corpus.flags(CONFIG, **flags | {"train_iters": 2}), tmp_path / "second", 2, check=False)
        assert run.codes == [1, 1] and "Traceback" not in run.output, run.output
        holder = f"process {rank.pid} on host {re.escape(socket.gethostname())}, run [0-9a-f]+"
        assert re.search(rf"{tmp_path / 'saved'} is in use by another run: {holder}", run.output), run.output
        # the same OUTPUT_DIR
        run = server.run(corpus.flags(CONFIG, train_iters=2), tmp_path / "first", check=False)
        assert run.codes == [1] and re.search(rf"{tmp_path / 'first'} is in use by another run", run.output)
        job.kill()
        rank.kill()
        rank.wait(10)
    # the lock of a dead process is taken over, and the run goes on
    last = int((tmp_path / "saved" / TRACKER).read_text())
    flags |= {"train_iters": last + 2, "load": tmp_path / "saved", "lr_decay_style": "constant"}
    argv = corpus.flags(CONFIG, **flags)
    run = server.run([*argv, "--override-opt_param-scheduler"], tmp_path / "first", 1)
    assert [row["iteration"] for row in run.rows][-2:] == [last + 1, last + 2]
    assert not list(tmp_path.rglob(".*lock"))


def test_two_names_of_one_directory_have_one_lock(server: Server, corpus: Corpus, tmp_path: Path) -> None:
    (tmp_path / "disk" / "saved").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "saved")
    with open(tmp_path / "disk" / ".saved.lock", "w") as file:
        fcntl.lockf(file, fcntl.LOCK_EX)  # a run with --save disk/saved
        flags = corpus.flags(CONFIG, train_iters=1, save=tmp_path / "link", ckpt_format="torch")
        run = server.run(flags, tmp_path / "run", check=False)
    assert run.codes == [1] and f"{tmp_path / 'link'} is in use by another run" in run.output, run.output


def without_file_locks() -> None:
    """A filesystem that has none."""
    import errno
    import fcntl

    def refuse(*arguments: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    fcntl.lockf = refuse


def test_a_filesystem_without_file_locks_is_one_warning(server: Server, corpus: Corpus, tmp_path: Path) -> None:
    flags = corpus.flags(CONFIG, train_iters=1, save=tmp_path / "saved", ckpt_format="torch")
    run = server.run(flags, tmp_path / "run", 2, hook=hook(without_file_locks))
    expected = f"warning: {tmp_path / 'run'} and {tmp_path / 'saved'}: the filesystem has no file locks"
    assert run.output.count(expected) == run.output.count("file locks") == 1, run.output


# The launcher


def test_ranks_without_a_launcher_save_and_stop(corpus: Corpus, tmp_path: Path) -> None:
    flags = {"train_iters": 100000, "save": tmp_path / "saved", "ckpt_format": "torch"}
    with launched(corpus.flags(CONFIG, **flags), tmp_path) as job:
        wait_for_iteration(job, 2)
        ranks = ranks_of(job)
        job.kill()
        _, alive = psutil.wait_procs(ranks, timeout=60)
        output, _ = job.communicate(timeout=10)
    assert not alive, output
    found = re.search(r"saved checkpoint of iteration (\d+)", output)
    assert found and (tmp_path / "saved" / TRACKER).read_text() == found[1], output
    assert "is gone: stopping after this iteration" in output and "Traceback" not in output, output


@pytest.mark.parametrize(("lost", "number", "status"), [(False, 0, 0), (False, 15, 143), (True, 0, 1), (True, 15, 1)])
def test_what_a_rank_exits_with(
    lost: bool, number: int, status: int, server: Server, corpus: Corpus, tmp_path: Path
) -> None:
    run = server.run(
        corpus.flags(CONFIG, train_iters=4, save=tmp_path / "saved", ckpt_format="torch"),
        tmp_path / "run",
        2,
        hook=hook(ask_rank_1),
        environment={"ASK": f"{int(lost)} {number}"},
        check=False,
    )
    assert run.codes == [status, status], run.output
    assert (tmp_path / "saved" / TRACKER).read_text() == ("2" if status else "4")


def ask_rank_1() -> None:
    """Rank 1 is asked to stop in the second step."""
    from minimind_mcore.training import step, stop

    train_step, calls = step.Engine.step, []
    lost, number = map(int, os.environ["ASK"].split())

    def asked(*arguments: Any) -> Any:
        calls.append(0)
        if len(calls) == 2 and os.environ["RANK"] == "1":
            if number:
                os.kill(os.getpid(), number)
            if lost:
                stop.StopSignal.lost = True  # type: ignore[attr-defined]
                for found in instances:
                    found.lost = True
        return train_step(*arguments)

    instances: list[Any] = []
    make = stop.StopSignal.__init__

    def noted(self: Any) -> None:
        make(self)
        instances.append(self)

    stop.StopSignal.__init__ = noted  # type: ignore[method-assign]
    step.Engine.step = asked  # type: ignore[method-assign]


@pytest.mark.parametrize("torchrun", [False, True], ids=["launcher", "torchrun"])
def test_a_signal_to_one_rank_ends_the_run_with_its_status(torchrun: bool, corpus: Corpus, tmp_path: Path) -> None:
    flags = {"train_iters": 100000, "save": tmp_path / "saved", "ckpt_format": "torch"}
    with launched(corpus.flags(CONFIG, **flags), tmp_path, torchrun=torchrun) as job:
        wait_for_iteration(job, 2)
        ranks_of(job)[1].send_signal(signal.SIGTERM)
        output, _ = job.communicate(timeout=60)
    found = re.search(r"saved checkpoint of iteration (\d+)", output)
    assert found and (tmp_path / "saved" / TRACKER).read_text() == found[1], output
    assert job.returncode == 143 and last_line(output) == "stopped by SIGTERM", output
    assert "Traceback" not in output


@pytest.mark.parametrize("torchrun", [False, True], ids=["launcher", "torchrun"])
def test_a_run_under_nohup_outlives_its_terminal(torchrun: bool, corpus: Corpus, tmp_path: Path) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with launched(corpus.flags(CONFIG, train_iters=100000), tmp_path, 1, torchrun=torchrun) as job:
            wait_for_iteration(job, 2)
            os.killpg(job.pid, signal.SIGHUP)
            wait_for_iteration(job, 9)
            os.killpg(job.pid, signal.SIGTERM)
            job.communicate(timeout=60)
    finally:
        signal.signal(signal.SIGHUP, before)
    assert job.returncode == 143


def test_an_interrupt_of_a_program_is_one_sentence() -> None:
    script = "import signal; from minimind_mcore import errors; errors.run(lambda: signal.raise_signal(signal.SIGINT))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 130 and done.stderr.startswith("interrupted;") and done.stderr.count("\n") == 1


# Ranks


@pytest.mark.parametrize("torchrun", [False, True], ids=["launcher", "torchrun"])
def test_a_killed_rank_is_named_in_the_last_line_without_a_traceback(
    torchrun: bool, corpus: Corpus, tmp_path: Path
) -> None:
    with launched(corpus.flags(CONFIG, train_iters=100000, **layout(tp=2)), tmp_path, torchrun=torchrun) as job:
        wait_for_iteration(job, 2)
        ranks_of(job)[1].kill()
        output, _ = job.communicate(timeout=60)
    assert job.returncode == 1 and "Traceback" not in output, output
    assert last_line(output).startswith("error: rank 1 ended with signal SIGKILL"), output


@pytest.mark.slow
def test_a_stopped_rank_is_named_within_a_minute(corpus: Corpus, tmp_path: Path) -> None:
    with launched(corpus.flags(CONFIG, train_iters=100000, **layout(tp=2)), tmp_path) as job:
        wait_for_iteration(job, 2)
        rank = ranks_of(job)[1]
        rank.suspend()
        began = time.monotonic()
        output, _ = job.communicate(timeout=90)
    assert time.monotonic() - began < 60, output
    assert job.returncode == 1 and "Traceback" not in output, output
    assert last_line(output).startswith(f"error: rank 1 (process {rank.pid} on host "), output
    assert "was stopped (SIGSTOP, or a debugger)" in last_line(output)


def quick_watch() -> None:
    """The watch of a run whose ranks are silent or stuck for a second."""
    from minimind_mcore.training import liveness

    liveness.INTERVAL_SECONDS, liveness.SILENT_SECONDS, liveness.ENDED_SECONDS = 0.2, 2.0, 1.0


def stop_rank() -> None:
    """A rank stops itself in the third step."""
    quick_watch()
    in_third_step(lambda: os.kill(os.getpid(), signal.SIGSTOP))


def kill_rank() -> None:
    quick_watch()
    in_third_step(lambda: os.kill(os.getpid(), signal.SIGKILL))


def sleep_rank() -> None:
    """A rank sleeps in the third step, as one that reads from a disk that does not answer."""
    from minimind_mcore.training import liveness

    quick_watch()
    make = liveness.Liveness.__init__
    liveness.Liveness.__init__ = lambda self, timeout: make(self, 3.0)  # type: ignore[method-assign]
    in_third_step(lambda: time.sleep(1000))


def in_third_step(fault: Callable[[], object]) -> None:
    from minimind_mcore.training import step

    train_step, calls = step.Engine.step, []

    def broken(*arguments: Any) -> Any:
        calls.append(0)
        if len(calls) == 3 and os.environ["RANK"] == os.environ["BROKEN"]:
            fault()
        return train_step(*arguments)

    step.Engine.step = broken  # type: ignore[method-assign]


@pytest.mark.parametrize("broken", [0, 1])
@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (stop_rank, r" was stopped \(SIGSTOP, or a debugger\) for \d+ s"),
        (kill_rank, " has ended"),
        (sleep_rank, r", which is at test_process_faults\.py:\d+ \(<lambda>\)"),
    ],
)
def test_a_rank_that_does_not_go_on_is_named_by_the_others(
    fault: Callable[[], None], message: str, broken: int, server: Server, corpus: Corpus, tmp_path: Path
) -> None:
    argv = corpus.flags(CONFIG, train_iters=100000, **layout(tp=2))
    run = server.run(argv, tmp_path, 2, hook(fault), {"BROKEN": str(broken)}, check=False)
    assert 0 not in run.codes and "Traceback" not in run.output, run.output
    assert re.search(rf"error: .*rank {broken} \(process \d+ on host \S+\){message}", run.output), run.output
    assert not re.search(rf"rank {1 - broken} \(process", run.output), run.output


def test_a_heartbeat_costs_a_step_nothing() -> None:
    from minimind_mcore.training import liveness

    began = time.perf_counter()
    for _ in range(10000):
        liveness.mark()
    assert (time.perf_counter() - began) / 10000 < 1e-4


# What cannot be used


def test_a_port_in_use_is_one_sentence(corpus: Corpus, tmp_path: Path) -> None:
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        command = [sys.executable, "-m", "minimind_mcore.launch", "--nproc-per-node", "1", "--master-port", str(port)]
        environment = os.environ | {"DEVICE": "cpu", "PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            [*command, str(ROOT / "pretrain_gpt.py"), *corpus.flags(CONFIG, train_iters=1)],
            env=environment, capture_output=True, text=True,
        )  # fmt: skip
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert last_line(done.stderr).startswith(f"error: MASTER_PORT={port} is in use on this host"), done.stderr


@pytest.mark.parametrize("torchrun", [False, True], ids=["launcher", "torchrun"])
def test_port_0_is_a_free_port(torchrun: bool, corpus: Corpus, tmp_path: Path) -> None:
    with launched(corpus.flags(CONFIG, train_iters=1), tmp_path, 2, port=0, torchrun=torchrun) as job:
        output, _ = job.communicate(timeout=120)
    assert job.returncode == 0, output


@pytest.mark.parametrize(("flag", "name"), [("log_file", "a/train.log"), ("tensorboard_dir", "a"), ("save", "a")])
@pytest.mark.parametrize("dry", [False, True], ids=["run", "dry run"])
def test_a_place_that_cannot_be_written_is_one_sentence(
    flag: str, name: str, dry: bool, server: Server, corpus: Corpus, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    argv = corpus.flags(CONFIG, train_iters=1, dry_run=dry, **{flag: tmp_path / "file" / name})
    run = server.run(argv, tmp_path / "run", 2, check=False)
    assert 0 not in run.codes and "Traceback" not in run.output, run.output
    message = f"error: {tmp_path / 'file' / 'a'}: cannot be written (Not a directory); give another directory with --"
    assert message + flag.replace("_", "-") in run.output, run.output


@pytest.mark.parametrize("dry", [False, True], ids=["run", "dry run"])
def test_an_output_directory_that_cannot_be_written_is_one_sentence(
    dry: bool, corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    command = [sys.executable, str(ROOT / "pretrain_gpt.py"), "--output-dir", str(tmp_path / "file" / "a")]
    done = subprocess.run([*command, *corpus.flags(CONFIG, train_iters=1, dry_run=dry)], capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    message = f"error: {tmp_path / 'file' / 'a'}: cannot be written (Not a directory); give another directory with"
    assert last_line(done.stderr) == f"{message} --output-dir (OUTPUT_DIR)"
