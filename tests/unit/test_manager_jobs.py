"""Jobs of the manager over HTTP. A quick program stands for the trainings."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import httpx  # pyright: ignore[reportMissingImports]
import psutil
import pytest
from helpers.manager import LONG, SHORT, Client, alive, eventually, iterations_of, lines_of, manager, read

from minimind_mcore.manager import record
from minimind_mcore.manager.files import Directories
from minimind_mcore.manager.queue import Hardware, Queue

pytest_plugins = ("helpers.manager_fixtures",)


def test_events_end_with_the_job_and_have_all_of_it(client: Client, place: Path) -> None:
    name = client.start(settings=SHORT, name="first <i>one</i>")
    events = read(client, name)
    log = (place / "jobs" / name / "log.txt").read_text().splitlines()
    assert lines_of(events) == log and "iteration 8 <b>你好</b>" in log
    assert "devices None cpu no token" in log
    assert iterations_of(events) == list(range(1, 9))
    assert events[-1][2]["state"] == "finished" and events[-1][2]["status"] == 0
    assert events[-1][2]["name"] == "first <i>one</i>"
    rows = client.get(f"/api/jobs/{name}/metrics").json()["rows"]
    assert [row["lm_loss"] for row in rows] == [5 / n for n in range(1, 9)]
    last = read(client, name, tail="?tail=3")
    assert lines_of(last) == log[-3:] and iterations_of(last) == list(range(1, 9))
    other = client.start(settings=SHORT)
    client.until(other, "finished")
    compared = client.get(f"/api/compare?jobs={name},{other}").json()["jobs"]
    assert [len(rows) for rows in compared.values()] == [8, 8] and list(compared) == [name, other]
    assert client.get(f"/api/compare?jobs={name},x").status_code == 404
    # The stream of a job that has ended ends: a browser opens at most six connections to a server.
    whole = list(client.events(f"/api/jobs/{name}/events"))
    assert lines_of(whole) == log and whole[-1][1] == "state"
    assert list(client.events(f"/api/jobs/{name}/events", whole[-1][0])) == []


def test_a_cut_stream_continues_exactly(client: Client, place: Path) -> None:
    name = client.start(settings={"TRAIN_ITERS": 60})
    found: list[tuple[str, str, Any]] = []
    for most in itertools.chain([1, 2, 1, 3], itertools.repeat(5)):
        part = read(client, name, found[-1][0] if found else "", most)
        found += part
        if part[-1][1] == "state" and part[-1][2]["state"] == "finished":
            break
    assert lines_of(found) == (place / "jobs" / name / "log.txt").read_text().splitlines()
    assert iterations_of(found) == list(range(1, 61))
    # Every id on its own leads to what follows it, and nothing else.
    for number, (last, _, _) in list(enumerate(found))[:: max(1, len(found) // 6)]:
        again = read(client, name, last) if number + 1 < len(found) else []
        assert lines_of(found[: number + 1]) + lines_of(again) == lines_of(found)


def test_stop_saves_and_resume_continues(client: Client) -> None:
    name = client.start(settings=LONG)
    client.wait(name, lambda job: len(client.get(f"/api/jobs/{name}/metrics").json()["rows"]) > 6)
    before = read(client, name, most=3)
    assert client.post(f"/api/jobs/{name}/stop").json()["state"] == "stopping"
    job = client.until(name, "stopped")
    assert job["status"] == 130 and job["error"] == ""
    before += read(client, name, before[-1][0])
    assert "saved" in lines_of(before)
    assert client.post(f"/api/jobs/{name}/stop").status_code == 400  # it has ended
    done = iterations_of(before)[-1]
    assert client.post(f"/api/jobs/{name}/resume").json()["state"] == "queued"
    assert client.post(f"/api/jobs/{name}/resume").status_code == 400
    client.wait(name, lambda job: len(client.get(f"/api/jobs/{name}/metrics").json()["rows"]) > done + 3)
    after = read(client, name, before[-1][0], most=12)
    # The trainer drops the rows after its checkpoint; the client learns of it and has no row twice.
    assert "reset" in [kind for _, kind, _ in after]
    rows = iterations_of(before + after)
    assert rows == list(range(1, len(rows) + 1)) and len(rows) > done - 2
    assert [line for line in lines_of(after) if line.startswith("== attempt 2")]


def test_a_failed_job_names_its_error(client: Client) -> None:
    name = client.start(settings={**LONG, "SEED": 3})
    job = client.until(name, "failed")
    assert job["status"] == 1 and job["error"] == "the loss is not a number"


def test_jobs_that_need_the_same_device_wait(client: Client) -> None:
    first = client.start(settings=LONG)
    second, third = client.start(settings=SHORT), client.start(settings=SHORT)
    client.until(first, "running")
    assert client.job(second)["state"] == "queued" and client.job(second)["waits_for"] == [first]
    assert client.job(third)["waits_for"] == [first, second]
    [cpu] = client.get("/api/devices").json()["devices"]
    assert cpu["jobs"] == [first]
    time.sleep(1)
    assert client.job(second)["state"] == "queued"
    assert client.post(f"/api/jobs/{third}/stop").json()["state"] == "stopped"  # before it began
    client.post(f"/api/jobs/{first}/stop")
    client.until(first, "stopped")
    ended = client.until(second, "finished")
    assert ended["started"] >= client.job(first)["ended"]
    assert client.job(third)["attempt"] == 0


def test_jobs_survive_a_killed_manager(tmp_path: Path, stub: str) -> None:
    with manager(tmp_path, PYTHONPATH=stub) as (client, process):
        name, waiting = client.start(settings=LONG), client.start(settings=SHORT)
        client.wait(name, lambda job: job["state"] == "running")
        before = read(client, name, most=4)
        process.send_signal(signal.SIGKILL)
        process.wait()
    with manager(tmp_path, PYTHONPATH=stub) as (client, process):
        job = client.job(name)
        assert job["state"] == "running" and job["attempt"] == 1
        assert client.job(waiting)["state"] == "queued"
        events = before + read(client, name, before[-1][0], most=4)
        client.post(f"/api/jobs/{name}/stop")
        events += read(client, name, events[-1][0])
        assert lines_of(events) == (tmp_path / name / "log.txt").read_text().splitlines()
        assert iterations_of(events) == list(range(1, len(iterations_of(events)) + 1))
        assert client.job(name)["state"] == "stopped" and client.job(name)["status"] == 130
        client.until(waiting, "finished")
        late = client.start(settings={"TRAIN_ITERS": 20})
        client.until(late, "running")
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
    eventually(lambda: (tmp_path / late / "exit.json").exists())  # while there is no manager
    directories = Directories(tmp_path, tmp_path, (tmp_path,))
    with contextlib.closing(Queue(directories, Hardware("cpu", (), 1), 60)) as queue:
        eventually(lambda: queue.jobs[late].state == "finished", seconds=20)
        assert queue.jobs[late].status == 0 and len(queue.listed()) == 3


def test_stop_ends_exactly_the_processes_of_the_job(client: Client, place: Path, stub: str) -> None:
    words = [sys.executable, "-m", "minimind_mcore.cli", "pretrain"]
    settings = {"OUTPUT_DIR": str(place / "bystander"), "TRAIN_ITERS": "3000", "DEVICE": "cpu", "SEED": "1"}
    bystander = subprocess.Popen(words, env={**os.environ, "PYTHONPATH": stub, **settings})
    try:
        stubborn = client.start(settings={**LONG, "SEED": 1})
        client.wait(stubborn, lambda job: len(client.get(f"/api/jobs/{stubborn}/metrics").json()["rows"]) > 2)
        mark = json.loads((place / "jobs" / stubborn / "job.json").read_text())["mark"]
        processes = record.processes(mark)
        assert len(processes) == 2  # the job's own, and the training
        for _ in range(3):  # a double click must not end a training that saves
            assert client.post(f"/api/jobs/{stubborn}/stop").json()["state"] == "stopping"
        assert client.post("/api/train/stop").json() == {"ok": True}
        time.sleep(1)
        assert client.job(stubborn)["state"] == "stopping" and all(map(alive, processes))
        client.post(f"/api/jobs/{stubborn}/kill")
        assert client.until(stubborn, "stopped")["status"] == 128 + signal.SIGKILL
        assert not any(map(alive, processes))
        parent = client.start(settings={**LONG, "SEED": 2})
        client.wait(parent, lambda job: len(client.get(f"/api/jobs/{parent}/metrics").json()["rows"]) > 2)
        mark = json.loads((place / "jobs" / parent / "job.json").read_text())["mark"]
        assert len(record.processes(mark)) == 3
        client.post(f"/api/jobs/{parent}/stop")
        client.until(parent, "stopped")
        assert record.processes(mark) == []  # also the child in a session of its own, which was left over
        assert bystander.poll() is None
    finally:
        bystander.kill()
        bystander.wait()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_dry_run_ends_with_the_manager(tmp_path: Path, stub: str, number: signal.Signals) -> None:
    with manager(tmp_path, PYTHONPATH=stub) as (client, process):
        body = {"stage": "pretrain", "settings": {"LR": 0.25}}  # its dry run takes 60 seconds

        def ask() -> None:
            with contextlib.suppress(httpx.HTTPError):
                client.post("/api/plan", json=body)

        asking = threading.Thread(target=ask)
        asking.start()
        eventually(lambda: bool(psutil.Process(process.pid).children()))
        dry_runs = psutil.Process(process.pid).children()
        process.send_signal(number)
        assert process.wait(20) == 0
        eventually(lambda: not any(map(alive, dry_runs)), seconds=1)
        asking.join(20)


def test_chat_serves_the_weights_of_a_job(client: Client, place: Path) -> None:
    name = client.start(settings=SHORT, tokenizer=str(place / "dataset/tokenizer"))
    client.until(name, "finished")
    busy = client.start(settings=LONG)
    reply = client.post(f"/api/jobs/{name}/chat")
    assert reply.status_code == 201, reply.text
    server = client.wait(reply.json()["id"], lambda job: job["state"] == "running" and job["address"])
    assert server["stage"] == "serve" and server["address"].startswith("http://127.0.0.1:")
    file = place / "jobs" / server["id"] / "log.txt"
    client.wait(server["id"], lambda job: file.exists() and "serving" in file.read_text())
    assert server["request"]["settings"] == {"--raw": True}  # a pretrained model continues texts
    log = file.read_text()
    port = server["address"].rstrip("/").rpartition(":")[2]
    assert f"serving {place}/jobs/{name}/pretrain/checkpoints {port}" in log
    # The server asks for a key, which other users of the host can read nowhere.
    file = place / "jobs" / server["id"] / "job.json"
    processes = record.processes(json.loads(file.read_text())["mark"])
    assert {process.environ().get("API_KEY") for process in processes} == {server["api_key"]}
    assert len(server["api_key"]) >= 32 and server["api_key"] not in log and file.stat().st_mode & 0o077 == 0
    assert client.job(busy)["state"] == "running"  # a server takes none of the CPU's slots
    client.post(f"/api/jobs/{server['id']}/stop")
    ended = client.until(server["id"], "stopped")
    assert ended["address"] == ended["api_key"] == ""
    assert client.post(f"/api/jobs/{server['id']}/chat").status_code == 400


def test_a_run_of_reinforcement_learning_is_watched_stopped_and_resumed(client: Client, place: Path) -> None:
    name = client.start("grpo", settings={"megatron_training.train_iters": 3000})
    rows = client.rows(name, 6)
    assert [row["grpo/score/mean"] for row in rows] == [1 - 1 / row["iteration"] for row in rows]
    samples = client.get(f"/api/jobs/{name}/samples").json()["samples"]
    assert samples[0]["iteration"] == max(sample["iteration"] for sample in samples)
    assert samples[0]["response"] == "<b>2</b>" and len(samples) <= 40
    client.post(f"/api/jobs/{name}/stop")
    assert client.until(name, "stopped")["status"] == 130
    saved = int((place / "jobs" / name / "grpo/checkpoints/saved").read_text())
    client.post(f"/api/jobs/{name}/resume")
    rows = client.rows(name, saved + 3)
    assert [row["iteration"] for row in rows] == list(range(1, len(rows) + 1))


@pytest.mark.parametrize("seconds", [0.0, 0.1, 0.3, 0.6])
def test_a_stop_right_after_the_start_ends_the_job(client: Client, place: Path, seconds: float) -> None:
    name = client.start(settings=LONG)
    client.until(name, "running")
    time.sleep(seconds)
    client.post(f"/api/jobs/{name}/stop")
    assert client.until(name, "stopped", seconds=20)["status"] == 130
    log = (place / "jobs" / name / "log.txt").read_text()
    assert "Traceback" not in log and log.splitlines()[-1] == "== ended with exit status 130"
    client.post(f"/api/jobs/{name}/resume")
    client.rows(name, 2)


def test_a_job_is_deleted_with_its_files_and_nothing_else(client: Client, place: Path) -> None:
    tokenizer = str(place / "dataset/tokenizer")
    name, kept = client.start(settings=SHORT, tokenizer=tokenizer), client.start(settings=SHORT)
    for job in (name, kept):
        client.until(job, "finished")
    folder, busy = place / "jobs" / name, client.start(settings=LONG)
    client.until(busy, "running")
    waiting = client.start(settings=LONG)
    for job, state in ((busy, "running"), (waiting, "queued")):
        refused = client.delete(f"/api/jobs/{job}")
        assert refused.status_code == 400 and f"is {state}; only a job that has ended" in refused.json()["error"]
        assert (place / "jobs" / job / "job.json").is_file()
    server = client.post(f"/api/jobs/{name}/chat").json()["id"]
    refused = client.delete(f"/api/jobs/{name}")
    assert refused.status_code == 400 and f"needed by {server} (" in refused.json()["error"] and folder.is_dir()
    client.post(f"/api/jobs/{server}/kill")
    client.until(server, "stopped")
    (folder / "pretrain/link").symlink_to(place / "secret.jsonl")
    (folder / "pretrain/big").write_bytes(b"0" * 2**20)
    described = client.job(name)["folder"]
    assert described["path"] == str(folder) and 1 <= described["size_mb"] < 1.1
    assert client.delete(f"/api/jobs/{name}").json() == {"deleted": described}
    assert not folder.exists() and (place / "secret.jsonl").is_file() and client.job(kept)["state"] == "finished"
    assert client.get(f"/api/jobs/{name}").status_code == client.delete(f"/api/jobs/{name}").status_code == 404
    assert name not in {job["id"] for job in client.get("/api/jobs").json()["jobs"]}
    assert not [file for file in (place / "jobs").iterdir() if name in file.name]


def test_a_directory_that_vanished_ends_no_other_job(client: Client, place: Path) -> None:
    name, other = client.start(settings=LONG), client.start(settings=SHORT)
    client.rows(name, 2)
    (place / "jobs" / name).rename(place / "vanished")
    client.post(f"/api/jobs/{name}/stop")
    client.until(name, "stopped", "failed")
    client.until(other, "finished")
    assert client.delete(f"/api/jobs/{name}").status_code == 200
    shutil.rmtree(place / "vanished")
