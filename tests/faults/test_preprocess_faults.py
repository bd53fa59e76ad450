"""Conversions that are killed, interrupted or run out of disk: never a hang, never half a dataset."""

from __future__ import annotations

import json
import multiprocessing
import operator
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest

from minimind_mcore.errors import UserError
from minimind_mcore.preprocess import train_tokenizer
from minimind_mcore.preprocess.check import check_dataset, quick_check
from minimind_mcore.preprocess.indexed import IndexedWriter
from minimind_mcore.preprocess.pool import _serve, run_tasks

REPOSITORY = Path(__file__).resolve().parents[2]
SUBSETS = 12
DEADLINE = 60


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a tokenizer and an input that takes some seconds on the slow backend."""
    directory = tmp_path_factory.mktemp("faults")
    words = ["train", "token", "你好", "世界", "model", "学习", "data"] + [f"w{number}" for number in range(2000)]
    generator = random.Random(0)
    with open(directory / "big.jsonl", "w", encoding="utf-8") as file:
        for _ in range(5_000):
            file.write(json.dumps({"text": " ".join(generator.choices(words, k=100))}, ensure_ascii=False) + "\n")
    arguments = ["--input", str(directory / "big.jsonl"), "--output", str(directory / "tk"), "--vocab-size", "500"]
    train_tokenizer.main(arguments)
    return directory


def command(work: Path, prefix: Path) -> list[str]:
    return [
        *(sys.executable, str(REPOSITORY / "preprocess_data.py"), "--input", str(work / "big.jsonl")),
        *("--tokenizer-name-or-path", str(work / "tk"), "--output-prefix", str(prefix), "--append-eod"),
        *("--workers", "2", "--n-subs", str(SUBSETS), "--tokenizer-backend", "tokenizers"),
    ]


@pytest.fixture
def start(work: Path) -> Iterator[Callable[[Path], subprocess.Popen[str]]]:
    """Start a conversion; whatever is left of it afterwards is ended."""
    running = []

    def launch(prefix: Path) -> subprocess.Popen[str]:
        process = subprocess.Popen(command(work, prefix), stderr=subprocess.PIPE, text=True, start_new_session=True)
        running.append(process)
        return process

    yield launch
    for process in running:
        if process.poll() is None:
            process.kill()
        process.communicate()


@pytest.fixture(scope="module")
def expected(work: Path) -> tuple[bytes, bytes]:
    subprocess.run(command(work, work / "whole"), check=True, capture_output=True, timeout=DEADLINE)
    return files_of(work / "whole")


def files_of(prefix: Path) -> tuple[bytes, bytes]:
    data, index = (Path(f"{prefix}_text_document{suffix}").read_bytes() for suffix in (".bin", ".idx"))
    return data, index


def final_files(prefix: Path) -> list[Path]:
    return list(prefix.parent.glob(f"{prefix.name}_text_document*"))


def wait_for_parts(prefix: Path, count: int) -> None:
    deadline = time.monotonic() + DEADLINE
    while len([p for p in prefix.parent.glob(f"{prefix.name}.parts/*/*.json") if p.stem.isdigit()]) < count:
        assert time.monotonic() < deadline, "the conversion does not start"
        time.sleep(0.01)


def is_worker(process: psutil.Process) -> bool:
    return "spawn_main" in " ".join(process.cmdline())


def blocks(process: psutil.Process, number: signal.Signals) -> bool:
    found = re.search(r"^SigBlk:\s*([0-9a-f]+)", Path(f"/proc/{process.pid}/status").read_text(), re.MULTILINE)
    return bool(found and int(found[1], 16) >> (number - 1) & 1)


def wait_until_gone(processes: list[psutil.Process]) -> None:
    _, left = psutil.wait_procs(processes, timeout=DEADLINE)
    assert not left, f"still running: {left}"


Start = Callable[[Path], "subprocess.Popen[str]"]


def test_a_killed_run_is_continued_to_the_same_bytes(work: Path, start: Start, expected: tuple[bytes, bytes]) -> None:
    prefix = work / "killed"
    process = start(prefix)
    wait_for_parts(prefix, 3)
    workers = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.wait(DEADLINE)
    wait_until_gone(workers)
    assert not final_files(prefix)
    again = subprocess.run(command(work, prefix), capture_output=True, text=True, timeout=DEADLINE)
    assert again.returncode == 0 and "done before" in again.stderr
    assert files_of(prefix) == expected
    assert check_dataset(f"{prefix}_text_document") == []
    assert not prefix.with_name("killed.parts").exists()


def test_a_killed_worker_ends_the_run_with_a_message(work: Path, start: Start, expected: tuple[bytes, bytes]) -> None:
    prefix = work / "worker"
    process = start(prefix)
    wait_for_parts(prefix, 1)
    workers = [p for p in psutil.Process(process.pid).children() if is_worker(p)]
    workers[0].kill()
    _, errors = process.communicate(timeout=DEADLINE)
    assert process.returncode == 1
    assert f"worker process {workers[0].pid} was killed by SIGKILL" in errors and "Traceback" not in errors
    wait_until_gone(workers)
    assert not final_files(prefix)
    subprocess.run(command(work, prefix), check=True, capture_output=True, timeout=DEADLINE)
    assert files_of(prefix) == expected


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupt_ends_all_processes_and_leaves_no_dataset(
    number: signal.Signals, status: int, work: Path, start: Start, expected: tuple[bytes, bytes]
) -> None:
    prefix = work / number.name
    process = start(prefix)
    wait_for_parts(prefix, 1)
    workers = psutil.Process(process.pid).children(recursive=True)
    if number == signal.SIGINT:  # as a terminal does it: to the whole group
        # A worker that takes it as well prints a traceback, if the worker is not ended before.
        taking = [worker.pid for worker in workers if is_worker(worker) and not blocks(worker, number)]
        os.killpg(process.pid, number)
        assert not taking
    else:
        process.send_signal(number)
    _, errors = process.communicate(timeout=DEADLINE)
    assert process.returncode == status and "Traceback" not in errors
    wait_until_gone(workers)
    assert not final_files(prefix)
    subprocess.run(command(work, prefix), check=True, capture_output=True, timeout=DEADLINE)
    assert files_of(prefix) == expected


def test_two_runs_at_once_make_one_dataset(work: Path, start: Start, expected: tuple[bytes, bytes]) -> None:
    prefix = work / "twice"
    first = start(prefix)
    wait_for_parts(prefix, 1)
    os.killpg(first.pid, signal.SIGSTOP)  # on a busy machine the first would end before the second begins
    second = start(prefix)
    assert second.stderr is not None
    waiting = next(line for line in second.stderr if "another process is converting it" in line)
    os.killpg(first.pid, signal.SIGCONT)
    errors = [process.communicate(timeout=DEADLINE)[1] for process in (first, second)]
    assert (first.returncode, second.returncode) == (0, 0)
    assert str(prefix) in waiting and "up to date" in errors[1]
    assert files_of(prefix) == expected


def test_parts_of_another_request_are_not_used(work: Path, start: Start, expected: tuple[bytes, bytes]) -> None:
    prefix = work / "changed"
    process = start(prefix)
    wait_for_parts(prefix, 2)
    process.kill()
    process.wait(DEADLINE)
    other = subprocess.run([*command(work, prefix), "--prepend-bos"], capture_output=True, text=True, timeout=DEADLINE)
    assert other.returncode == 0 and "done before" not in other.stderr
    assert len(files_of(prefix)[0]) == len(expected[0]) + 4 * 5_000


def test_a_truncated_bin_is_found_before_training(work: Path, expected: tuple[bytes, bytes], tmp_path: Path) -> None:
    for suffix in (".bin", ".idx", ".meta.json"):
        shutil.copy(f"{work}/whole_text_document{suffix}", tmp_path / f"cut{suffix}")
    os.truncate(tmp_path / "cut.bin", len(expected[0]) - 1)
    with pytest.raises(UserError, match=r"cut\.bin: truncated"):
        quick_check(tmp_path / "cut")
    arguments = [sys.executable, str(REPOSITORY / "preprocess_data.py"), "--check", str(tmp_path / "cut")]
    check = subprocess.run(arguments, capture_output=True, text=True, timeout=DEADLINE)
    assert check.returncode == 1 and "truncated" in check.stderr and "SHA-256" in check.stderr


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MB."""
    place = tmp_path / "disk"
    place.mkdir()
    arguments = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)]
    try:
        mounted = subprocess.run(arguments, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("no mount command")
    if mounted.returncode:
        pytest.skip(f"mounting a tmpfs is not permitted here: {mounted.stderr.strip()}")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_full_disk_is_named_and_leaves_no_dataset(work: Path, small_disk: Path) -> None:
    prefix = small_disk / "out"
    full = subprocess.run(command(work, prefix), capture_output=True, text=True, timeout=DEADLINE)
    assert full.returncode == 1
    assert f"disk full while writing {small_disk}" in full.stderr and "Traceback" not in full.stderr
    assert not final_files(prefix)


def test_a_full_disk_at_the_index_is_named_and_leaves_no_files(small_disk: Path) -> None:
    documents = np.ones(100_000, np.int32)  # 0.2 MB of tokens, 2 MB of index
    with (
        pytest.raises(UserError, match=f"disk full while writing {small_disk}/out"),
        IndexedWriter(small_disk / "out", "uint16") as writer,
    ):
        writer.add(documents, documents)
    assert not list(small_disk.iterdir())


def test_a_full_disk_at_the_merge_keeps_the_parts(work: Path, small_disk: Path, expected: tuple[bytes, bytes]) -> None:
    prefix = small_disk / "out"
    arguments = [*command(work, prefix), "--cache-dir", str(work / "elsewhere")]
    full = subprocess.run(arguments, capture_output=True, text=True, timeout=DEADLINE)
    assert full.returncode == 1 and f"disk full while writing {prefix}_text_document.bin" in full.stderr
    assert not final_files(prefix)
    subprocess.run(["mount", "-o", "remount,size=30m", str(small_disk)], check=True)
    again = subprocess.run(arguments, capture_output=True, text=True, timeout=DEADLINE)
    assert again.returncode == 0 and f"({SUBSETS} done before)" in again.stderr
    assert files_of(prefix) == expected


def test_an_exception_in_a_worker_arrives_with_its_traceback() -> None:
    with pytest.raises(RuntimeError, match="IndexError"):
        list(run_tasks(operator.attrgetter("__getitem__"), ["only"], [0, 99], 2, lambda: None))


def test_a_worker_that_ends_or_is_killed_is_an_error() -> None:
    with pytest.raises(UserError, match="ended with status 3"):
        list(run_tasks(operator.itemgetter(0), (os._exit,), [3], 1, lambda: None))
    with pytest.raises(UserError, match="killed by SIGKILL"):
        list(run_tasks(operator.itemgetter(0), (signal.raise_signal,), [int(signal.SIGKILL)] * 4, 2, lambda: None))


def test_a_worker_whose_parent_has_closed_the_pipe_ends_quietly() -> None:
    ours, theirs = multiprocessing.Pipe()

    def setup(state: None) -> Callable[[int], int]:
        theirs.send("a result")  # not read: now reading fails with ECONNRESET instead of the end of the file
        ours.close()
        return int

    _serve(theirs, setup, None)
