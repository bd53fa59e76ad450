"""The training manager over HTTP. A quick program stands for the trainings; test_manager_training.py has a real one."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import http.server
import itertools
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx  # pyright: ignore[reportMissingImports]
import psutil
import pytest
from helpers.engine import ROOT
from helpers.manager import TOKEN, Client, manager, stub_path

from minimind_mcore.doctor.installed import Host
from minimind_mcore.errors import UserError
from minimind_mcore.hosts import free_port
from minimind_mcore.manager import ascend_api, devices, events, record, request, runner
from minimind_mcore.manager import queue as queue_module
from minimind_mcore.manager.api import create_app
from minimind_mcore.manager.files import Places
from minimind_mcore.manager.plan import Planner
from minimind_mcore.manager.queue import Hardware, Queue, environment
from minimind_mcore.tools.process import Result
from minimind_mcore.tools.registry import Toolbox

LONG = {"TRAIN_ITERS": 3000}
SHORT = {"TRAIN_ITERS": 8}


@pytest.fixture(scope="module")
def stub(tmp_path_factory: pytest.TempPathFactory) -> str:
    return stub_path(tmp_path_factory.mktemp("stub"))


@pytest.fixture(scope="module")
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


@pytest.fixture(scope="module")
def client(stub: str, place: Path) -> Iterator[Client]:
    environment = {"PYTHONPATH": stub, "DATA_DIR": str(place / "dataset")}
    with manager(place / "jobs", "--trust-reward-models", **environment) as (client, _):
        yield client


@pytest.fixture(autouse=True)
def _leave_nothing(request: pytest.FixtureRequest) -> Iterator[None]:
    """End the jobs that a test leaves, so that the next one finds the CPU's slot free."""
    yield
    if "client" in request.fixturenames:
        client = request.getfixturevalue("client")
        for job in client.get("/api/jobs").json()["jobs"]:
            if job["state"] not in record.ENDED:
                client.post(f"/api/jobs/{job['id']}/kill")
        for job in client.get("/api/jobs").json()["jobs"]:
            client.until(job["id"], *record.ENDED)


PATHS = (
    "GET /api/info", "GET /api/form/grpo", "GET /api/devices", "GET /api/datasets", "GET /api/checkpoints",
    "GET /api/tokenizers", "GET /api/jobs", "POST /api/jobs", "POST /api/plan", "GET /api/compare", "GET /api/jobs/x",
    "POST /api/jobs/x/stop", "POST /api/jobs/x/kill", "POST /api/jobs/x/resume", "POST /api/jobs/x/chat",
    "GET /api/jobs/x/events",
    "GET /api/jobs/x/metrics", "GET /api/jobs/x/samples", "GET /api/status", "GET /api/weights",
    "POST /api/train/start", "POST /api/train/stop", "GET /api/train/logs", "GET /api/npu", "GET /api/mcp/info",
    "GET /api/mcp/tools/list", "POST /api/mcp/tools/call", "GET /api/nothing",
)  # fmt: skip


def test_nothing_answers_without_the_token(client: Client) -> None:
    for token in ("", "wrong", TOKEN + "x", TOKEN[:-1]):
        with Client(str(client.base_url), token) as stranger:
            for path in PATHS:
                reply = stranger.request(*path.split())
                assert reply.status_code == 401 and "token" in reply.json()["error"], path
    # The token in the address would end in logs and histories.
    assert httpx.get(f"{client.base_url}/api/jobs?token={TOKEN}").status_code == 401


def test_other_web_pages_may_not_read(client: Client) -> None:
    for method in ("GET", "OPTIONS"):
        headers = {"Origin": "http://evil.example", "Access-Control-Request-Method": "GET"}
        reply = client.request(method, "/api/jobs", headers=headers)
        assert not [name for name in reply.headers if name.startswith("access-control")]


def test_the_page_is_for_everybody_and_has_no_data(client: Client) -> None:
    reply = httpx.get(str(client.base_url))
    assert reply.status_code == 200 and "manager.js" in reply.text and TOKEN not in reply.text
    assert "default-src 'none'" in reply.headers["content-security-policy"]


def test_what_there_is(client: Client, place: Path) -> None:
    info = client.get("/api/info").json()
    assert info["device"] == "cpu" and "minimind3" in info["presets"]
    assert (
        list(info["stages"])
        == (
            "download tokenizer pretrain full_sft lora dpo reason toolcall ppo grpo spo distillation eval convert serve"
        ).split()
    )
    assert info["stages"]["lora"]["inputs"] == {"data": False, "tokenizer": False, "weights": True}
    datasets = {row["name"]: row for row in client.get("/api/datasets").json()["datasets"]}
    assert {"pretrain_t2t_mini.jsonl", "sft_t2t_mini.jsonl"} <= datasets.keys()
    assert datasets["sft_t2t_mini.jsonl"]["path"] == str(place / "dataset/sft_t2t_mini.jsonl")
    weights = client.get("/api/checkpoints").json()["checkpoints"]
    assert str(place / "dataset/full_sft_768.pth") in [row["path"] for row in weights]
    tokenizers = client.get("/api/tokenizers").json()["tokenizers"]
    assert str(place / "dataset/tokenizer") in [row["path"] for row in tokenizers]
    [cpu] = client.get("/api/devices").json()["devices"]
    assert cpu["kind"] == "cpu" and cpu["total"] > cpu["used"] > 0 and cpu["jobs"] == []
    assert client.get("/api/jobs/none").status_code == 404 and client.get("/api/nothing").status_code == 404
    assert client.delete("/api/jobs").status_code == 405


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
    places = Places(tmp_path / "jobs", tmp_path / "dataset", (tmp_path / "jobs", tmp_path / "dataset"))
    prefix = converted.removesuffix("_packed_input_ids_document")
    assert {row["path"] for row in places.datasets()} == {str(tmp_path / name) for name in (*data, prefix)}


def form(client: Client, stage: str, **query: str) -> dict[str, dict[str, Any]]:
    reply = client.get(f"/api/form/{stage}", params=query)
    assert reply.status_code == 200, reply.text
    return {option["name"]: option for option in reply.json()["options"]}


def test_a_form_has_the_recipes_values_and_the_parsers_flags(client: Client) -> None:
    sft = form(client, "full_sft")
    assert [sft[name]["default"] for name in ("EPOCHS", "LR", "MBS", "GBS", "SEQ_LENGTH")] == [
        "2", "1e-05", "16", "16", "768",
    ]  # fmt: skip
    assert form(client, "full_sft", recipe="minimind2")["LR"]["default"] == "1e-06"
    assert form(client, "pretrain", model="minimind3_tiny")["SEQ_LENGTH"]["default"] == "256"
    assert sft["--weight-decay"]["kind"] == "float" and sft["--dpo-loss-type"]["choices"][0] == "sigmoid"
    assert sft["TP"]["limits"] == "1 or more" and sft["PRECISION"]["choices"] == ["bf16", "fp16", "fp32"]
    grpo = form(client, "grpo")
    assert grpo["actor_config.lr"]["kind"] == "float" and grpo["rl_config.n_samples_per_prompt"]["group"] == "main"
    assert grpo["minimind.precision"]["choices"] == ["fp32", "bf16", "fp16"]
    assert "critic_config.lr" in form(client, "ppo") and "critic_config.lr" not in grpo
    for stage in client.get("/api/info").json()["stages"]:
        # No field takes a path or text: that is what keeps flags and programs out of values.
        assert {option["kind"] for option in form(client, stage).values()} <= {"int", "float", "choice", "flag"}
        assert not [name for name in form(client, stage) if "trust" in name or name == "save" or name[2:6] == "load"]
    assert client.get("/api/form/full_sft?model=minimindd3").status_code == 400
    assert client.get("/api/info").json()["recipes"] == ["minimind2", "minimind3", "tiny"]


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


def test_an_address_of_ipv6_has_brackets(tmp_path: Path, stub: str) -> None:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("this host has no IPv6")
    with manager(tmp_path, "--host", "::1", PYTHONPATH=stub) as (client, _):
        assert client.base_url.host == "::1" and client.get("/api/jobs").json() == {"jobs": []}


def test_the_plan_is_the_kits_dry_run(client: Client) -> None:
    before = client.get("/api/jobs").json()
    plan = client.post("/api/plan", json={"stage": "pretrain", "settings": {"LR": 1e-3, "--weight-decay": 0.2}}).json()
    assert plan["facts"]["layout"] == "1 process" and plan["facts"]["memory"].startswith("about 0.10 GiB")
    [command] = plan["commands"]
    assert "LR=0.001" in command and command.endswith("minimind-mcore pretrain --weight-decay=0.2")
    assert "MODEL=minimind3_tiny" in command and plan["device"] == "cpu"
    assert "BACKEND=native" in command.split()  # MindSpeed-LLM, the default on an NPU, does not save at a stop
    other = client.post("/api/plan", json={"stage": "pretrain", "settings": {"BACKEND": "mindspeed-llm"}}).json()
    assert "BACKEND=mindspeed-llm" in other["commands"][0].split()
    same = client.post("/api/jobs", json={"stage": "pretrain", "dry_run": True, "settings": {"LR": 0.5}})
    assert same.status_code == 422 and same.json()["error"] == "LR=0.5 is too much\nlower it"
    assert client.post("/api/jobs", json={"stage": "pretrain", "settings": {"LR": 0.5}}).status_code == 422
    assert client.get("/api/jobs").json() == before


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


def test_settings_of_the_manager_change_no_plan(tmp_path: Path, stub: str) -> None:
    (tmp_path / "full_sft.pth").write_bytes(b"0")
    own = {"TRAIN_ITERS": "3", "TASK": "mmlu", "FORMAT": "minimind", "PAD_HEAD_DIM": "128", "LR": "0.5"}
    with manager(tmp_path / "jobs", DATA_DIR=str(tmp_path), PYTHONPATH=stub, **own) as (client, _):
        for stage in ("pretrain", "grpo", "eval", "convert"):
            body = {"stage": stage} | (
                {"weights": str(tmp_path / "full_sft.pth")} if stage in ("eval", "convert") else {}
            )
            reply = client.post("/api/plan", json=body)
            assert reply.status_code == 200, reply.text
            text = " ".join(reply.json()["commands"])
            assert not re.search("train_iters=3|mmlu|FORMAT=minimind|PAD_HEAD_DIM|TRAIN_ITERS=3 |LR=0.5", text), text


def test_stages_run_the_pipelines_commands(client: Client, place: Path) -> None:
    data, weights = str(place / "dataset/sft_t2t_mini.jsonl"), str(place / "dataset/full_sft_768.pth")
    shared = {"data": data, "weights": weights}
    expected = {
        "full_sft": ("minimind-mcore sft", shared), "lora": ("minimind-mcore lora", shared),
        "dpo": ("minimind-mcore dpo", shared), "toolcall": ("minimind-mcore sft", shared),
        "reason": ("minimind-mcore reason", shared | {"model": "minimind2"}),
        "distillation": ("minimind-mcore distill", shared | {"teacher": weights}),
        "convert": ("minimind-mcore convert mcore2hf", {"weights": weights}),
        "eval": ("minimind-mcore generate --prompt-file", {"weights": weights}),
        "serve": ("minimind-mcore serve", {"weights": weights}),
        "tokenizer": (f"minimind-mcore tokenizer --input {data}", {"data": data}),
        "grpo": ("minimind-mcore rl single", {}),
        "ppo": (f"actor_config.load={weights}", shared | {"reward_model": str(place / "dataset")}),
        "spo": ("minimind.algorithm=spo", {}),
    }  # fmt: skip
    for stage, (words, fields) in expected.items():
        reply = client.post("/api/plan", json={"stage": stage, **fields})
        assert reply.status_code == 200, (stage, reply.text)
        commands = reply.json()["commands"]
        assert words in commands[-1], stage
        if "weights" in fields:
            assert weights in commands[-1], stage
    missing = client.post("/api/plan", json={"stage": "full_sft", "data": data})
    assert missing.status_code == 400 and missing.json()["error"].startswith("weights: the stage full_sft needs it")


def lines_of(events: list[tuple[str, str, Any]]) -> list[str]:
    return [line for _, kind, data in events if kind == "log" for line in data["lines"]]


def iterations_of(events: list[tuple[str, str, Any]]) -> list[int]:
    found: list[int] = []
    for _, kind, data in events:
        found = [] if kind == "reset" else found
        found += [row["iteration"] for row in data["rows"]] if kind == "metrics" else []
    return found


def read(client: Client, name: str, last: str = "", most: int = 10**6, tail: str = "") -> list[tuple[str, str, Any]]:
    """The events of a job, until it has ended or there are so many."""
    found = []
    with contextlib.closing(client.events(f"/api/jobs/{name}/events{tail}", last)) as events:
        for event in events:
            found.append(event)
            if len(found) >= most or (event[1] == "state" and event[2]["state"] in record.ENDED):
                return found
    return found


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


def test_code_of_a_reward_model_needs_a_flag_of_the_manager(own_queue: Queue, tmp_path: Path) -> None:
    (tmp_path / "reward").mkdir()
    (tmp_path / "rlaif.jsonl").write_text("{}\n")
    (tmp_path / "full_sft.pth").write_bytes(b"0")
    files = {"data": "rlaif.jsonl", "weights": "full_sft.pth", "reward_model": "reward"}
    asked = job_request(stage="grpo", settings={}, **{name: str(tmp_path / file) for name, file in files.items()})
    with pytest.raises(UserError, match="--trust-reward-models"):
        own_queue.add(asked)
    assert own_queue.listed() == []
    trusting = dataclasses.replace(own_queue.places, trusts_reward_models=True)
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


def test_jobs_on_different_devices_run_at_once(
    tmp_path: Path, stub: str, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", stub)
    places = Places(tmp_path, place / "dataset", (tmp_path, place / "dataset"))
    kind = "cuda"
    with contextlib.closing(Queue(places, Hardware(kind, (0, 1, 5), 1), 60)) as queue:
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
            Queue(places, Hardware("cpu", (), 1), 60)
        for job in jobs[::-1]:
            queue.stop(job)
        while any(job.state not in record.ENDED for job in jobs):
            assert time.monotonic() < end + 30
            time.sleep(0.05)


def job_request(**fields: Any) -> Any:
    from minimind_mcore.manager.request import read

    return read({"stage": "pretrain", "settings": LONG, **fields})


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
    time.sleep(1)  # the job ends while there is no manager
    with manager(tmp_path, PYTHONPATH=stub) as (client, process):
        job = client.until(late, "finished", seconds=20)
        assert job["status"] == 0 and len(client.get("/api/jobs").json()["jobs"]) == 3


def alive(process: psutil.Process) -> bool:
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


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


def test_a_job_that_does_not_save_in_time_is_killed(tmp_path: Path, stub: str) -> None:
    with manager(tmp_path, "--stop-seconds", "1", PYTHONPATH=stub) as (client, _):
        name = client.start(settings={**LONG, "SEED": 1})
        client.wait(name, lambda job: len(client.get(f"/api/jobs/{name}/metrics").json()["rows"]) > 2)
        client.post(f"/api/jobs/{name}/stop")
        assert client.until(name, "stopped", seconds=20)["status"] == 128 + signal.SIGKILL


@pytest.fixture
def own_queue(tmp_path: Path, stub: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Queue]:
    """A queue in this process, with one GPU, whose thread does nothing: the test calls `tick`."""
    monkeypatch.setenv("PYTHONPATH", stub)
    monkeypatch.setattr("minimind_mcore.manager.queue.TICK_SECONDS", 3600)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    with contextlib.closing(Queue(Places(tmp_path, tmp_path, (tmp_path,)), Hardware("cuda", (0,), 1), 600)) as queue:
        yield queue
        for job in queue.listed():
            record.end(job.mark)


def eventually(is_so: Callable[[], bool], seconds: float = 30) -> None:
    """Wait until a condition holds."""
    end = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < end
        time.sleep(0.05)


def start_own(queue: Queue, **settings: int) -> record.JobRecord:
    """Start a job of a queue and wait until its training runs."""
    job = queue.add(job_request(settings={**LONG, **settings}))
    queue.tick()
    eventually(lambda: (queue.output(job) / "metrics.jsonl").exists())
    return job


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


def test_a_stop_survives_a_killed_manager(tmp_path: Path, stub: str) -> None:
    with manager(tmp_path, PYTHONPATH=stub) as (client, process):
        name, waiting = client.start(settings=LONG), client.start(settings=LONG)
        client.wait(name, lambda job: len(client.get(f"/api/jobs/{name}/metrics").json()["rows"]) > 2)
        process.kill()
        process.wait()
    # As if the manager had been killed between the record of the stop and the signal.
    for job in (name, waiting):
        file = tmp_path / job / "job.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"state": "stopping"}))
    with manager(tmp_path, PYTHONPATH=stub) as (client, process):
        assert client.until(name, "stopped", seconds=20)["status"] == 130
        assert "saved" in (tmp_path / name / "log.txt").read_text().splitlines()
        # A job whose process was not yet known is not started again.
        assert client.until(waiting, "stopped", seconds=20)["attempt"] == 0


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


def test_a_reused_process_number_is_not_touched(tmp_path: Path, stub: str) -> None:
    with manager(tmp_path, PYTHONPATH=stub) as (client, process):
        name = client.start(settings=LONG)
        client.wait(name, lambda job: len(client.get(f"/api/jobs/{name}/metrics").json()["rows"]) > 2)
        process.kill()
        process.wait()
    file = tmp_path / name / "job.json"
    job = json.loads(file.read_text())
    record.end(job["mark"])
    bystander = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    try:
        # The system has given the number to another program.
        file.write_text(json.dumps(job | {"pid": bystander.pid}))
        with manager(tmp_path, PYTHONPATH=stub) as (client, process):
            assert client.until(name, "failed")["status"] == 128 + signal.SIGKILL
            assert client.post(f"/api/jobs/{name}/stop").status_code == 400
            assert bystander.poll() is None
            client.post(f"/api/jobs/{name}/resume")
            client.until(name, "running")
            client.post(f"/api/jobs/{name}/stop")
            client.until(name, "stopped")
        assert bystander.poll() is None
    finally:
        bystander.kill()
        bystander.wait()


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


BAD: list[tuple[str, Any]] = [
    ("stage", value) for value in (
        "", "sft; rm -rf /", "../pretrain", "pretrain\n", "--help", None, 7, ["pretrain"], "x" * 10**6, "run", "doctor",
    )
] + [
    ("model", value) for value in (
        "minimind3; touch /tmp/x", "$(id)", "`id`", "../../etc/passwd", "/etc/passwd", "--help", "minimind3\nLR=1",
        "minimind3\0", "m" * 5000, {"a": 1}, "|cat",
    )
] + [
    ("data", value) for value in (
        "/etc/passwd", "../../../etc/passwd", "/proc/self/environ", "{place}/secret.jsonl",
        "{place}/dataset/link.jsonl",
        "{place}/dataset/../secret.jsonl", "{place}/dataset/*.jsonl", "{place}/dataset/sft_t2t_mini.jsonl\n--load",
        "{place}/dataset/sft_t2t_mini.jsonl\0", "--help", "{place}/dataset/none.jsonl", "/" * 5000,
        "0.5 {place}/dataset/sft_t2t_mini.jsonl 0.5 /etc/passwd", "~/.ssh/id_rsa", "file:///etc/passwd",
    )
] + [
    ("settings", value) for value in (
        {"LR": "1e-3; id"}, {"LR": "$(id)"}, {"LR": "1e-3 --load /etc"}, {"LR": "--help"}, {"LR": "1\n2"}, {"LR": "１"},
        {"LR": "nan"}, {"LR": "inf"}, {"LR": -1}, {"LR": True}, {"LR": "9" * 10**5}, {"EPOCHS": 1.5}, {"EPOCHS": 0},
        {"TRAIN_ITERS": 2**70}, {"PRECISION": "fp8"}, {"PACK": "yes"}, {"--save": "/etc"}, {"--load": "/etc"},
        {"--weight-decay": "0.1 --save /etc"}, {"--weight-decay=1 --save": 1}, {"LD_PRELOAD": 1},
        {"PYTHONPATH": "/tmp"},
        {"DATA_PATH": 1}, {"CKPT_LOAD_DIR": "/etc"}, {"--dry-run": True}, {"--trust-pickle": True}, {"LR": [1]},
        {"LR\n": 1}, {f"X{n}": n for n in range(500)}, "LR=1", {"--num-layers": "0x10"}, {"--num-layers": "1_000"},
    )
] + [
    ("name", "x" * 100), ("name", "a\nb"), ("name", "\u202egnp.exe"),
    ("devices", [0]), ("devices", ["0; id"]), ("devices", -1), ("device", "cpu; id"), ("device", "cuda"),
    ("recipe", "tiny --load"), ("unknown", 1), ("commands", [["sh", "-c", "id"]]), ("id", "../x"),
]  # fmt: skip


def test_hostile_requests_are_refused(client: Client, place: Path) -> None:
    assert len(BAD) > 80
    before = client.get("/api/jobs").json()
    for field, value in BAD:
        value = value.replace("{place}", str(place)) if isinstance(value, str) else value
        body = json.dumps({"stage": "pretrain", "settings": SHORT, field: value})
        for path in ("/api/plan", "/api/jobs"):
            reply = client.post(path, content=body)
            assert reply.status_code == 400, (field, str(value)[:80], reply.status_code, reply.text[:200])
            assert 0 < len(reply.json()["error"]) < 2000, (field, str(value)[:80])
    for text in (b"", b"{", b"[]", b"null", b'"x"', b"\xff", b"[" * 10**5, b'{"stage": NaN}'):
        assert client.post("/api/jobs", content=text).status_code == 400, text[:20]
    assert client.post("/api/jobs", content=b" " * (9 << 20)).status_code == 413
    for name in ("..", "%2e%2e", "..%2f..%2fetc", "a%00b", "x" * 3000):
        for reply in (client.get(f"/api/jobs/{name}"), client.post(f"/api/jobs/{name}/stop")):
            assert reply.status_code in (404, 405), name
    assert client.get("/api/jobs").json() == before


@pytest.mark.parametrize(
    ("stage", "field"),
    [
        ("full_sft", "weights"),
        ("eval", "lora"),
        ("distillation", "teacher"),
        ("full_sft", "tokenizer"),
        ("grpo", "reward_model"),
    ],
)
def test_every_input_must_lie_in_a_readable_directory(client: Client, place: Path, stage: str, field: str) -> None:
    weights = str(place / "dataset/full_sft_768.pth")
    inputs = client.get("/api/info").json()["stages"][stage]["inputs"]
    needed = {name: weights for name in ("weights", "teacher") if name in inputs}
    for path in ("/etc", f"{place}/secret.jsonl", f"{place}/dataset/link.jsonl", f"{place}/dataset/../secret.jsonl"):
        reply = client.post("/api/plan", json={"stage": stage, **needed, field: path})
        assert reply.status_code == 400, reply.text
        error = reply.json()["error"]
        assert error.startswith(f"{field}: ") and "is outside of the directories" in error, error


def test_paths_of_minimind_ascend(client: Client, place: Path) -> None:
    assert client.get("/api/status").json()["status"] in ("idle", "finished", "error")
    weights, datasets = client.get("/api/weights").json()["weights"], client.get("/api/datasets").json()["datasets"]
    assert {key: weights[-1][key] for key in ("name", "size_mb")} == {"name": "full_sft_768.pth", "size_mb": 0.0}
    assert {"name", "size_mb"} <= datasets[0].keys()
    body = {
        "stage": "full_sft", "hidden_size": 512, "num_hidden_layers": 8, "use_moe": False, "epochs": 3, "batch_size": 4,
        "learning_rate": 1e-5, "data_path": "sft_t2t_mini", "from_weight": "full_sft_768", "save_weight": "mine",
        "extra_args": "--weight-decay 0.2 --decay-all --seed=5",
    }  # fmt: skip
    refused = client.post("/api/train/start", json=body)
    assert refused.status_code == 200 and not refused.json()["ok"]  # a seed is a setting
    assert "--seed" in refused.json()["error"]
    body["extra_args"] = "--weight-decay 0.2 --decay-all --dpo-beta=0.3"
    started = client.post("/api/train/start", json=body).json()
    assert started["ok"], started
    command = started["command"]
    for word in ("MODEL=minimind2_small", "EPOCHS=3", "MBS=4", "LR=1e-05", "--weight-decay=0.2", "--decay-all"):
        assert word in command.split(), word
    assert f"CKPT_LOAD_DIR={place}/dataset/full_sft_768.pth" in command.split()
    for hostile in ("; id", "--save /etc", "--weight-decay 0.1;id", "| sh"):
        reply = client.post("/api/train/start", json=body | {"extra_args": hostile}).json()
        assert not reply["ok"] and reply["error"], hostile
    assert not client.post("/api/train/start", json=body | {"hidden_size": 513}).json()["ok"]
    assert not client.post("/api/train/start", json=body | {"from_weight": "../../etc/passwd"}).json()["ok"]
    job = client.get("/api/jobs").json()["jobs"][0]
    client.until(job["id"], *record.ENDED)
    assert job["name"] == "mine"


def test_the_log_of_minimind_ascend(client: Client, place: Path) -> None:
    name = client.start(settings={"TRAIN_ITERS": 40})
    client.until(name, "running")
    status = client.get("/api/status").json()
    assert status["status"] == "running" and status["stage"] == "pretrain" and status["elapsed_seconds"] >= 0
    first = list(itertools.islice(client.events("/api/train/logs"), 6))
    events = first + list(client.events("/api/train/logs", first[-1][0]))
    log = (place / "jobs" / name / "log.txt").read_text().splitlines()
    assert [data["data"] for _, _, data in events if data["type"] == "log"] == log
    assert events[-1][2] == {"type": "status", "data": "finished"}
    assert client.get("/api/status").json()["log_lines"] == len(log)
    assert client.post("/api/train/stop").json() == {"ok": False, "error": "no training runs"}
    running, waiting = client.start(settings=LONG), client.start(settings=LONG)
    client.wait(running, lambda job: len(client.get(f"/api/jobs/{running}/metrics").json()["rows"]) > 2)
    assert client.post("/api/train/stop").json() == {"ok": True}  # the training that runs, not the newest
    assert (client.job(running)["state"], client.job(waiting)["attempt"]) == ("stopping", 0)
    assert client.until(running, "stopped")["status"] == 130


def test_tools_of_minimind_ascend(client: Client) -> None:
    info = client.get("/api/mcp/info").json()
    assert info["jsonrpc"] == "2.0" and info["result"]["capabilities"] == {"tools": True}
    tools = {tool["name"]: tool for tool in client.get("/api/mcp/tools/list").json()["result"]["tools"]}
    assert tools["calculate_math"]["inputSchema"]["required"] == ["expression"]
    for call, text in (
        ({"name": "calculate", "arguments": {"expression": "123*456"}}, "56088"),
        ({"name": "get_weather", "arguments": {"city": "北京"}}, "北京"),
    ):
        result = client.post("/api/mcp/tools/call", json=call).json()["result"]
        assert text in result["content"][0]["text"] and result["isError"] is False
    wrong = client.post("/api/mcp/tools/call", json={"name": "rm", "arguments": {}}).json()["result"]
    assert wrong["isError"] is True
    assert client.post("/api/mcp/tools/call", json={}).status_code == 400
    cards = client.get("/api/npu").json()
    assert cards["devices"] == [] and "npu-smi" in cards["raw"]


def test_two_tools_run_at_a_time(own_queue: Queue, monkeypatch: pytest.MonkeyPatch) -> None:
    running: list[str] = []
    most: list[int] = []

    def run(toolbox: Toolbox, name: str, arguments: object) -> Result:
        running.append(name)
        most.append(len(running))
        time.sleep(0.05)
        running.remove(name)
        return Result("", ok=True)

    async def ask() -> list[int]:
        transport = httpx.ASGITransport(create_app(Planner(own_queue), TOKEN))
        headers = {"Authorization": f"Bearer {TOKEN}"}
        async with httpx.AsyncClient(transport=transport, base_url="http://manager", headers=headers) as client:
            calls = (client.post("/api/mcp/tools/call", json={"name": "get_current_time"}) for _ in range(8))
            return [reply.status_code for reply in await asyncio.gather(*calls)]

    monkeypatch.setattr(Toolbox, "run", run)
    assert asyncio.run(ask()) == [200] * 8
    assert len(most) == 8 and max(most) == 2


def test_the_command_line_is_checked(tmp_path: Path) -> None:
    def refused(*flags: str, **environment: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "minimind_mcore.cli", "manager", "--jobs", str(tmp_path), *flags],
            env={**os.environ, "PYTHONPATH": str(ROOT), "DEVICE": "cpu", **environment},
            capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        assert done.returncode == 1, done.stderr
        return done.stderr

    assert "--port 70000" in refused("--port", "70000")
    assert "TOKEN" in refused(TOKEN="two words")
    assert "no such directory" in refused("--allow", str(tmp_path / "none"))
    assert "cpu-slots" in refused("--cpu-slots", "0")
