"""The manager's queue, records and devices, in this process."""

from __future__ import annotations

import contextlib
import dataclasses
import http.server
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from helpers.engine import ROOT
from helpers.manager import LONG, eventually, job_request, start_own

from minimind_mcore.doctor.installed import Host
from minimind_mcore.errors import UserError
from minimind_mcore.hosts import free_port
from minimind_mcore.manager import ascend_api, devices, events, record, request, runner
from minimind_mcore.manager import queue as queue_module
from minimind_mcore.manager.files import Directories
from minimind_mcore.manager.queue import Hardware, Queue, environment

pytest_plugins = ("helpers.manager_fixtures",)


def test_the_list_of_data_has_only_data(tmp_path: Path) -> None:
    data = ("dataset/pretrain.jsonl", "dataset/book.txt", "dataset/rows.parquet")
    converted = "jobs/20260101-full_sft/cache/sft_packed_input_ids_document"
    others = (
        "dataset/dataset_info.json", "dataset/model/config.json", "dataset/model/merges.txt",
        "dataset/tokenizer-6400/tokenizer.json", "dataset/tokenizer-6400/vocab.txt",
        "dataset/full_sft/latest_checkpointed_iteration.txt", "jobs/20260101-full_sft/log.txt",
        "jobs/20260101-full_sft/job.json", "jobs/20260101-full_sft/exit.json",
        "jobs/20260101-full_sft/full_sft/metrics.jsonl", "jobs/20260101-full_sft/eval/replies.jsonl",
        "jobs/20260101-full_sft/full_sft/checkpoints/latest_checkpointed_iteration.txt",
    )  # fmt: skip
    for name in (*data, *others, f"{converted}.idx", f"{converted}.bin"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("0")
    directories = Directories(tmp_path / "jobs", tmp_path / "dataset", (tmp_path / "jobs", tmp_path / "dataset"))
    prefix = converted.removesuffix("_packed_input_ids_document")
    assert {row["path"] for row in directories.datasets()} == {str(tmp_path / name) for name in (*data, prefix)}


def test_samples_may_have_any_characters(own_queue: Queue) -> None:
    job = own_queue.add(job_request(stage="grpo", settings={}))
    own_queue.output(job).mkdir()
    rows = [{"iteration": n, "response": f"a{mark}b"} for n, mark in enumerate("\u2028\u2029\x85\x0b\x1e\r")]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (own_queue.output(job) / "samples.jsonl").write_text(text)
    assert events.samples(own_queue, job, 40) == rows[::-1]


def test_a_damaged_record_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("damaged", "empty"):
        (tmp_path / name).mkdir()
    (tmp_path / "damaged/job.json").write_text('{"id": "damaged"')
    assert record.read_job(tmp_path / "damaged") is None and record.read_job(tmp_path / "empty") is None
    [line] = caplog.messages
    assert str(tmp_path / "damaged/job.json") in line


# Settings that belong to the host, to the installation, or to scripts that are not jobs.
OF_THE_HOST = set(
    "ASCEND_TOOLKIT_HOME CANN_HOME CPU_AFFINITY_CONF FIND_LINKS GROUP_ID HCCL_CONNECT_TIMEOUT HCCL_EXEC_TIMEOUT "
    "HF_ENDPOINT HOME LOG_LEVEL MEGATRON_HOME MINDSPEED_HOME MINDSPEED_LLM_HOME MODELSCOPE_ENDPOINT MOUNTS NNAL_HOME "
    "NUM_CPUS OMP_NUM_THREADS PYTHON PYTHONPATH PYTORCH_NPU_ALLOC_CONF RAY_ADDRESS RAY_AUTH_MODE RAY_FLAGS RAY_TMPDIR "
    "REHEARSAL REHEARSE SOCKET_IFNAME TASK_QUEUE_ENABLE TORCH_INDEX_URL USER_ID WAIT_SECONDS WORKERS".split()
)


def test_jobs_inherit_no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    [names] = json.loads((ROOT / "tests/contract/names.json").read_text())["settings"].values()
    settings = {name for name in " ".join(names).split() if not name.startswith("QUICKSTART_")}
    for name in {*settings, "TOKEN", "API_KEY", "HOSTFILE"}:
        monkeypatch.setenv(name, "1")
    inherited = environment("mark")
    assert settings & inherited.keys() == OF_THE_HOST & settings
    assert not {"TOKEN", "API_KEY", "HOSTFILE"} & inherited.keys()
    # An empty setting of a command means "not given".
    assert runner.environment({"LORA_DIR": ""})["LORA_DIR"] == ""


def test_code_of_a_reward_model_needs_a_flag_of_the_manager(own_queue: Queue, tmp_path: Path) -> None:
    (tmp_path / "reward").mkdir()
    (tmp_path / "rlaif.jsonl").write_text("{}\n")
    (tmp_path / "full_sft.pth").write_bytes(b"0")
    files = {"data": "rlaif.jsonl", "weights": "full_sft.pth", "reward_model": "reward"}
    asked = job_request(stage="grpo", settings={}, **{name: str(tmp_path / file) for name, file in files.items()})
    with pytest.raises(UserError, match="--trust-reward-models"):
        own_queue.add(asked)
    assert own_queue.listed() == []
    trusting = dataclasses.replace(own_queue.directories, trusts_reward_models=True)
    words = request.commands(asked, trusting, tmp_path / "job")[-1].words
    assert "minimind.reward_model_trust_remote_code=true" in words


def test_a_log_that_was_cut_is_read_from_its_beginning(own_queue: Queue) -> None:
    job = own_queue.add(job_request(settings=LONG))
    log = own_queue.folder(job) / "log.txt"
    log.write_text("first\nsecond\n")
    [shown, state] = events.news(own_queue, job, events.Cursor())
    assert shown.data == {"lines": ["first", "second"]}
    log.write_text("third\n")  # as copytruncate of logrotate does
    [shown] = events.news(own_queue, job, state.cursor)
    assert shown.data == {"lines": ["third"]} and shown.cursor.log == 6


def test_many_rows_come_in_parts_and_the_state_comes_last(own_queue: Queue) -> None:
    job = own_queue.add(job_request())
    own_queue.output(job).mkdir()
    file = own_queue.output(job) / "metrics.jsonl"
    values = {f"metric_{n}": n / 7 for n in range(20)}
    file.write_text("".join(json.dumps({"iteration": n, **values}) + "\n" for n in range(30000)) + '{"iteration": 3')
    found: list[Any] = []
    cursor = events.Cursor()
    while part := events.news(own_queue, job, cursor):
        found += part
        cursor = part[-1].cursor
    assert [event.kind for event in found[:-1]] == ["metrics"] * (len(found) - 1) and found[-1].kind == "state"
    rows = [row for event in found[:-1] for row in event.data["rows"]]
    assert [row["iteration"] for row in rows] == list(range(30000))
    assert max(len(event.data["rows"]) for event in found[:-1]) <= 1000
    file.write_text('{"iteration": 1}\n')  # the same file, cut
    again: list[Any] = events.news(own_queue, job, cursor)
    assert [event.kind for event in again] == ["reset", "metrics"] and again[1].data["rows"] == [{"iteration": 1}]


def test_jobs_on_different_devices_run_at_once(
    tmp_path: Path, stub: str, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", stub)
    directories = Directories(tmp_path, place / "dataset", (tmp_path, place / "dataset"))
    kind = "cuda"
    with contextlib.closing(Queue(directories, Hardware(kind, (0, 1, 5), 1), 60)) as queue:
        jobs = [
            queue.add(job_request(devices=devices, device=device))
            for devices, device in (([0], ""), ([5, 1], ""), ([1], ""), ([], "cpu"), ([0, 5], ""))
        ]
        end = time.monotonic() + 30
        while not all((queue.folder(job) / "log.txt").exists() for job in (jobs[0], jobs[1], jobs[3])):
            assert time.monotonic() < end
            time.sleep(0.05)
        assert [job.state for job in jobs] == ["running", "running", "queued", "running", "queued"]
        assert queue.blockers(jobs[2]) == [jobs[1].id]
        assert queue.blockers(jobs[4]) == [jobs[0].id, jobs[1].id]
        for job in jobs:
            assert job.commands[0].settings["DEVICE"] == (job.device or kind)
        assert jobs[1].commands[0].settings["CUDA_VISIBLE_DEVICES"] == "1,5"
        assert jobs[1].commands[0].settings["NPUS_PER_NODE"] == "2"
        assert jobs[1].commands[0].settings["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"  # as nvidia-smi numbers them
        for devices, device, message in (([7], "", "found \\[7\\]"), ([0], "cpu", "expected none"), ([], "x", "cpu")):
            with pytest.raises(UserError, match=message):
                queue.add(job_request(devices=devices, device=device))
        with pytest.raises(UserError, match="another manager uses this directory"):
            Queue(directories, Hardware("cpu", (), 1), 60)
        for job in jobs[::-1]:
            queue.stop(job)
        while any(job.state not in record.ENDED for job in jobs):
            assert time.monotonic() < end + 30
            time.sleep(0.05)


def test_the_table_has_the_accelerators_and_their_jobs(tmp_path: Path) -> None:
    rows = "".join(
        f"| {n}     910B2               | {health:<13} | 94.5        4{n}                0    / 0             |\n"
        f"| 0                         | 0000:C1:00.0  | 0           0    / 0          3410 / 65536         |\n"
        for n, health in enumerate(("OK", "Alarm"))
    )
    (tmp_path / "npu-smi").write_text(f"#!/bin/sh\ncat <<'TABLE'\n{rows}TABLE\n")
    (tmp_path / "npu-smi").chmod(0o755)
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    host = Host(root=tmp_path, environ={"PATH": path, "ASCEND_RT_VISIBLE_DEVICES": "1"})
    hardware = Hardware.find(1, host)
    assert (hardware.kind, hardware.numbers) == ("npu", (1,))
    asked = job_request()
    fields = {"id": "x", "request": asked, "commands": [], "created": 0.0, "state": "running"}
    jobs = [record.JobRecord(**fields, device="npu", devices=[1]), record.JobRecord(**fields, device="cpu", devices=[])]
    first, second, cpu = devices.table(hardware, jobs, host)
    wanted = {"name": "910B2", "health": "OK", "used": 3410, "total": 65536, "power": "94.5", "temperature": "40"}
    assert first.items() >= wanted.items() and first["usable"] is False and first["jobs"] == []
    assert second["health"] == "Alarm" and second["usable"] is True and second["jobs"] == ["x"]
    assert cpu["kind"] == "cpu" and cpu["jobs"] == ["x"]
    assert hardware.choose(asked) == ("npu", [1])
    assert hardware.settings("npu", [1]) == {"DEVICE": "npu", "ASCEND_RT_VISIBLE_DEVICES": "1", "NPUS_PER_NODE": "1"}


def test_pages_that_are_open_cost_little(own_queue: Queue, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[tuple[str, ...]] = []

    def run(host: Host, *command: str) -> str:
        commands.append(command)
        return "0, H100, 1, 2\n"

    monkeypatch.setattr(Host, "run", run)
    monkeypatch.setattr("minimind_mcore.manager.devices.time", SimpleNamespace(monotonic=lambda: 1e9))
    for _ in range(3):
        first, _cpu = devices.table(own_queue.hardware, [])
        assert first["name"] == "H100"
    assert len(commands) == 1  # nvidia-smi and npu-smi are slow
    job = own_queue.add(job_request())
    own_queue.output(job).mkdir()
    file = own_queue.output(job) / "metrics.jsonl"
    reads: list[Path] = []

    def read_history(path: Path) -> list[dict[str, float]]:
        reads.append(path)
        return [json.loads(line) for line in path.read_text().splitlines()]

    monkeypatch.setattr(events, "read_history", read_history)
    for rows in (2, 2, 3, 3):
        file.write_text("".join(f'{{"iteration": {n}}}\n' for n in range(rows)))
        os.utime(file, (1, 1))
        assert events.metrics(own_queue, job, 10) == [{"iteration": n} for n in range(rows)]
    assert reads == [file] * 2
    log, count = tmp_path / "log.txt", ascend_api.LineCounter()
    assert count(log) == 0
    for text, lines in (("a\nb", 1), ("a\nb\nc\n", 3), ("d\n", 1)):
        log.write_text(text)
        assert count(log) == lines


def test_a_step_of_the_clock_ends_no_job(own_queue: Queue, monkeypatch: pytest.MonkeyPatch) -> None:
    job = start_own(own_queue, SEED=1)  # does not answer SIGINT
    create, now = psutil.Process.create_time, time.time
    monkeypatch.setattr(psutil.Process, "create_time", lambda process: create(process) + 7200)
    monkeypatch.setattr(time, "time", lambda: now() + 7200)
    own_queue.tick()
    assert job.state == "running" and job.is_alive()
    own_queue.stop(job)
    monkeypatch.setattr(time, "time", lambda: now() + 14400)
    own_queue.tick()
    assert job.state == "stopping" and job.is_alive()  # it has 600 seconds to save


def test_a_second_signal_does_not_reach_the_training(own_queue: Queue) -> None:
    job = start_own(own_queue, SEED=4)  # leaves at the second SIGINT without saving
    for _ in range(3):
        os.kill(job.pid, signal.SIGINT)
        time.sleep(0.05)
    eventually(lambda: not job.is_alive())
    assert "saved" in (own_queue.folder(job) / "log.txt").read_text().splitlines()


def test_a_device_is_not_free_before_all_processes_have_ended(
    own_queue: Queue, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Stuck(psutil.Process):
        """A process that waits in a driver: signals do not end it."""

        ended = False

        def kill(self) -> None:
            pass

        def is_running(self) -> bool:
            return not self.ended

    job, waiting = start_own(own_queue), own_queue.add(job_request(settings=LONG))
    stuck, find = [Stuck(os.getpid())], record.processes
    monkeypatch.setattr(record, "processes", lambda mark: find(mark) + (stuck if mark == job.mark else []))
    begin = time.monotonic()
    own_queue.kill(job)
    assert time.monotonic() - begin < 5  # requests do not wait for the end of a process
    eventually(lambda: not job.is_alive())
    for _ in range(3):
        own_queue.tick()
        time.sleep(0.1)
    assert (job.state, waiting.state) == ("stopping", "queued")
    stuck.pop().ended = True
    own_queue.tick()
    assert (job.state, waiting.state) == ("stopped", "running")


@pytest.mark.parametrize("port", ["0", "free", None])
def test_a_server_listens_at_the_port_of_its_link(own_queue: Queue, tmp_path: Path, port: str | None) -> None:
    (tmp_path / "full_sft.pth").write_bytes(b"0")
    given = str(free_port()) if port == "free" else port
    asked = job_request(
        stage="serve", weights=str(tmp_path / "full_sft.pth"), settings={"--port": given, "--max-queue": 5}
    )
    job = own_queue.add(asked)
    own_queue.tick()
    found = job.commands[-1].settings["PORT"]
    assert int(found) > 0 and job.address == f"http://127.0.0.1:{found}/" and given in (found, "0", None)
    assert job.commands[-1].words == ["serve", "--max-queue=5"]


def test_a_server_is_asked_without_the_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    class Health(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()

    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{free_port()}")  # where nothing listens
    monkeypatch.delenv("no_proxy", raising=False)
    with http.server.HTTPServer(("127.0.0.1", 0), Health) as server:
        threading.Thread(target=server.handle_request, daemon=True).start()
        assert queue_module.answers(f"http://127.0.0.1:{server.server_port}/")


def test_a_server_that_does_not_answer_delays_no_request(own_queue: Queue, monkeypatch: pytest.MonkeyPatch) -> None:
    job = start_own(own_queue)
    job.address = "http://127.0.0.1:1/"

    def answers(address: str) -> bool:
        request = threading.Thread(target=own_queue.stop, args=(job,))
        request.start()
        request.join(5)
        assert not request.is_alive()  # it would wait for the lock
        return True

    monkeypatch.setattr(queue_module, "answers", answers)
    own_queue.ask_servers()
    assert job.ready and job.state == "stopping"


def test_a_job_that_does_not_save_in_time_is_killed(own_queue: Queue) -> None:
    own_queue.stop_seconds = 0.2
    job = start_own(own_queue, SEED=1)  # does not answer SIGINT
    own_queue.stop(job)
    time.sleep(0.2)
    eventually(lambda: (own_queue.tick(), job.state)[1] == "stopped")
    assert job.status == 128 + signal.SIGKILL


@contextlib.contextmanager
def next_queue(old: Queue) -> Iterator[Queue]:
    """The queue of the next manager of the same directory."""
    old.close()
    with contextlib.closing(Queue(old.directories, old.hardware, 600)) as queue:
        yield queue


def rewrite(queue: Queue, job: record.JobRecord, **fields: Any) -> None:
    """Change the record of a job on disk."""
    file = queue.folder(job) / "job.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def test_a_stop_survives_a_killed_manager(own_queue: Queue) -> None:
    jobs = start_own(own_queue), own_queue.add(job_request(settings=LONG))
    for job in jobs:  # as if the manager had been killed between the record of the stop and the signal
        rewrite(own_queue, job, state="stopping")
    with next_queue(own_queue) as queue:
        running, waiting = (queue.jobs[job.id] for job in jobs)
        eventually(lambda: (queue.tick(), running.state)[1] == "stopped")
        assert running.status == 130
        assert "saved" in (queue.folder(running) / "log.txt").read_text().splitlines()
        # A job whose process was not yet known is not started again.
        assert (waiting.state, waiting.attempt) == ("stopped", 0)


def test_a_reused_process_number_is_not_touched(own_queue: Queue) -> None:
    job = start_own(own_queue)
    record.end(job.mark)
    bystander = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    try:
        rewrite(own_queue, job, pid=bystander.pid)  # the system has given the number to another program
        with next_queue(own_queue) as queue:
            found = queue.jobs[job.id]
            queue.tick()
            assert (found.state, found.status) == ("failed", 128 + signal.SIGKILL)
            with pytest.raises(UserError, match="has ended"):
                queue.stop(found)
            queue.resume(found)
            queue.tick()
            queue.kill(found)
            eventually(lambda: (queue.tick(), found.state)[1] == "stopped")
        assert bystander.poll() is None
    finally:
        bystander.kill()
        bystander.wait()


def test_a_job_that_cannot_be_written_stops_no_other(own_queue: Queue, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = start_own(own_queue), own_queue.add(job_request(settings=LONG, device="cpu"))
    follow = own_queue._follow
    monkeypatch.setattr(own_queue, "_follow", lambda job: follow(job) if job is not first else 1 / 0)
    own_queue.tick()
    assert second.state == "running"


def test_a_deleted_job_is_not_resumed(own_queue: Queue) -> None:
    job = own_queue.add(job_request())
    own_queue.stop(job)
    own_queue.delete(job)
    with pytest.raises(UserError, match="has been deleted"):  # another request had found it before
        own_queue.resume(job)
    with pytest.raises(UserError, match="has been deleted"):
        own_queue.delete(job)
    assert not own_queue.folder(job).exists()


def test_a_deletion_that_was_cut_is_finished(own_queue: Queue) -> None:
    left = own_queue.directories.jobs / ".deleted-20260101-pretrain-1a2b"
    (left / "pretrain").mkdir(parents=True)
    (left / "job.json").write_text("{}")
    with next_queue(own_queue) as queue:
        assert not left.exists() and not queue.jobs


@pytest.mark.parametrize("jobs", ["jobs", "link"])
@pytest.mark.parametrize(
    ("stage", "field", "state", "is_needed"),
    [
        ("full_sft", "weights", "queued", True), ("full_sft", "weights", "running", True),
        ("full_sft", "weights", "stopped", True), ("dpo", "weights", "failed", True),
        ("full_sft", "weights", "finished", False), ("lora", "weights", "finished", True),
        ("pretrain", "tokenizer", "finished", True), ("convert", "weights", "finished", False),
        ("serve", "weights", "running", True), ("serve", "weights", "stopped", False),
        ("eval", "weights", "failed", False),
    ],
)  # fmt: skip
def test_a_job_is_kept_while_another_needs_its_files(
    own_queue: Queue, tmp_path: Path, jobs: str, stage: str, field: str, state: record.State, is_needed: bool
) -> None:
    (tmp_path / "jobs").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "jobs")
    directories = dataclasses.replace(own_queue.directories, jobs=tmp_path / jobs)
    with contextlib.closing(Queue(directories, own_queue.hardware, 600)) as queue:
        job = queue.add(job_request())
        queue.stop(job)
        made = queue.output(job) / "checkpoints"
        made.mkdir(parents=True)
        other = queue.add(job_request(stage=stage, settings={}, **{field: str(made)}))
        other.state = state
        if is_needed:
            with pytest.raises(UserError, match=other.id):
                queue.delete(job)
        else:
            queue.delete(job)
        assert made.exists() == (job.id in queue.jobs) == is_needed


def test_a_job_whose_directory_is_a_link_is_not_deleted(own_queue: Queue, tmp_path: Path) -> None:
    job = own_queue.add(job_request())
    own_queue.stop(job)
    folder, moved = own_queue.folder(job), tmp_path / "disk" / job.id
    moved.parent.mkdir()
    folder.rename(moved)
    folder.symlink_to(moved)
    other = own_queue.add(job_request(stage="full_sft", settings={}, weights=str(folder)))
    with pytest.raises(UserError, match=other.id):
        own_queue.delete(job)
    own_queue.stop(other)
    own_queue.delete(other)
    with pytest.raises(UserError, match=f"is a link to {moved}"):
        own_queue.delete(job)
    assert folder.is_symlink() and (moved / "job.json").is_file() and job.id in own_queue.jobs


def test_what_a_deletion_leaves_is_named_and_not_listed(
    own_queue: Queue, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    job = own_queue.add(job_request())
    own_queue.stop(job)
    left = own_queue.directories.jobs / f".deleted-{job.id}"
    monkeypatch.setattr("shutil.rmtree", lambda path, ignore_errors: None)  # as if the files were another user's
    with pytest.raises(UserError, match=f"{left} could not be deleted"):
        own_queue.delete(job)
    with next_queue(own_queue) as queue:
        assert not queue.jobs and (left / "job.json").is_file()
        assert [str(left) in line for line in caplog.messages] == [True]


def test_a_copied_or_renamed_directory_is_not_listed(
    own_queue: Queue, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    kept, renamed = own_queue.add(job_request()), own_queue.add(job_request())
    own_queue.stop(kept)
    others = tmp_path / f"{kept.id}.bak", tmp_path / "renamed"
    shutil.copytree(own_queue.folder(kept), others[0])
    own_queue.folder(renamed).rename(others[1])
    with next_queue(own_queue) as queue:
        assert list(queue.jobs) == [kept.id]
        assert all(f"{other}/job.json has the id" in caplog.text for other in others)
        queue.delete(queue.jobs[kept.id])
        assert not queue.folder(kept).exists() and all((other / "job.json").is_file() for other in others)
