"""Fixtures of the tests of the manager: one manager for all of them, and a queue in this process."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from helpers.manager import Client, manager, stub_path
from minimind_mcore.manager import record
from minimind_mcore.manager.files import Directories
from minimind_mcore.manager.queue import Hardware, Queue


@pytest.fixture(scope="session")
def stub(tmp_path_factory: pytest.TempPathFactory) -> str:
    return stub_path(tmp_path_factory.mktemp("stub"))


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with data and a tokenizer, which the manager may read."""
    folder = tmp_path_factory.mktemp("place")
    (folder / "dataset/tokenizer").mkdir(parents=True)
    (folder / "dataset/tokenizer/tokenizer.json").write_text("{}")
    for name in ("pretrain_t2t_mini", "sft_t2t_mini"):
        (folder / f"dataset/{name}.jsonl").write_text('{"text": "a"}\n')
    (folder / "dataset/full_sft_768.pth").write_bytes(b"0" * 2048)
    (folder / "secret.jsonl").write_text("{}\n")
    (folder / "dataset/link.jsonl").symlink_to(folder / "secret.jsonl")
    return folder


@pytest.fixture(scope="session")
def shared_manager(stub: str, place: Path) -> Iterator[Client]:
    environment = {"PYTHONPATH": stub, "DATA_DIR": str(place / "dataset")}
    with manager(place / "jobs", "--trust-reward-models", **environment) as (client, _):
        yield client


@pytest.fixture
def client(shared_manager: Client) -> Iterator[Client]:
    """A client of the manager. Jobs that a test leaves are ended, so that the next one finds the CPU's slot free."""
    yield shared_manager
    for job in shared_manager.get("/api/jobs").json()["jobs"]:
        if job["state"] not in record.ENDED:
            shared_manager.post(f"/api/jobs/{job['id']}/kill")
            shared_manager.until(job["id"], *record.ENDED)


@pytest.fixture
def own_queue(tmp_path: Path, stub: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Queue]:
    """A queue in this process, with one GPU, whose thread does nothing: the test calls `tick`."""
    monkeypatch.setenv("PYTHONPATH", stub)
    monkeypatch.setattr("minimind_mcore.manager.queue.TICK_SECONDS", 3600)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    with contextlib.closing(
        Queue(Directories(tmp_path, tmp_path, (tmp_path,)), Hardware("cuda", (0,), 1), 600)
    ) as queue:
        yield queue
        for job in queue.listed():
            record.end(job.mark)
