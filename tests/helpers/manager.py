"""The training manager as a program, a client of it, and a quick stand-in for the trainings that it starts."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx  # pyright: ignore[reportMissingImports]
import psutil

from helpers.engine import ROOT
from minimind_mcore.manager import record, request
from minimind_mcore.manager.queue import Queue

TOKEN = "token-of-the-tests"
LONG = {"TRAIN_ITERS": 3000}
SHORT = {"TRAIN_ITERS": 8}
# Runs in place of `python -m minimind_mcore.cli COMMAND`. SEED 1: does not answer SIGINT. SEED 2: has a child in a
# session of its own. SEED 3: fails. SEED 4: takes 0.5 s to save, and leaves at a second SIGINT. Each of TRAIN_ITERS
# rows takes SAVE_INTERVAL milliseconds.
STUB = """
import json, os, signal, subprocess, sys, time
from pathlib import Path

words, env = sys.argv[1:], os.environ
if "--dry-run" in words:
    if env.get("LR") == "0.5":
        sys.exit("error: LR=0.5 is too much\\nlower it")
    time.sleep(60 if env.get("LR") == "0.25" else 0)
    print("layout:     1 process")
    print("memory:     about 0.10 GiB per rank")
    print("time:       about 1 s per iteration")
    sys.exit()
print("devices", env.get("CUDA_VISIBLE_DEVICES"), env["DEVICE"], "token" if "TOKEN" in env else "no token", flush=True)
seed = env.get("SEED")
asked = []
def stop(*_):
    if seed == "4" and asked:
        os._exit(9)
    asked.append(1)


signal.signal(signal.SIGINT, signal.SIG_IGN if seed == "1" else stop)
signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT, signal.SIGTERM])  # as `errors.run` does
if seed == "2":
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
if words[0] == "serve":
    from http.server import BaseHTTPRequestHandler, HTTPServer

    class Page(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"<!doctype html><title>chat</title><h1>the chat page</h1>")

    server = HTTPServer(("127.0.0.1", int(env["PORT"])), Page)
    server.timeout = 0.1
    print("serving", env["LOAD_DIR"], env["PORT"], flush=True)
    while not asked:
        server.handle_request()
    sys.exit()
given = dict(word.split("=", 1) for word in words if "=" in word)
rl = words[0] == "rl"
folder = Path(given["minimind.output_dir"] if rl else env["OUTPUT_DIR"])
iterations = int(given.get("megatron_training.train_iters") or env["TRAIN_ITERS"])
saved, metrics = folder / "checkpoints/saved", folder / "metrics.jsonl"
saved.parent.mkdir(parents=True, exist_ok=True)
begin = int(saved.read_text()) if saved.exists() else 0
if metrics.exists():
    kept = [line for line in metrics.read_text().splitlines() if json.loads(line)["iteration"] <= begin]
    metrics.with_suffix(".tmp").write_text("".join(line + "\\n" for line in kept))
    metrics.with_suffix(".tmp").replace(metrics)
for iteration in range(begin + 1, iterations + 1):
    time.sleep(int(env.get("SAVE_INTERVAL") or 20) / 1000)
    print(f"iteration {iteration} <b>\\u4f60\\u597d</b>", flush=True)
    value = {"grpo/score/mean": 1 - 1 / iteration} if rl else {"lm_loss": 5 / iteration}
    with metrics.open("a") as file:
        file.write(json.dumps({"iteration": iteration, **value, "eta_seconds": 1.0}) + "\\n")
    if rl:
        sample = {"iteration": iteration, "prompt": "1+1=", "response": "<b>2</b>", "label": "2", "reward": "1.00"}
        with (folder / "samples.jsonl").open("a") as file:
            file.write(json.dumps(sample) + "\\n")
    if asked or iteration % 5 == 0:
        saved.write_text(str(max(iteration - 2, 0)))
    if asked:
        time.sleep(0.5 if seed == "4" else 0)
        print("saved", flush=True)
        sys.exit(130)
    if seed == "3" and iteration == 3:
        sys.exit("error: the loss is not a number")
"""
SITE = """
import os, sys
if sys.orig_argv[1:3] == ["-m", "minimind_mcore.cli"]:
    os.execv(sys.executable, [sys.executable, "-S", {stub!r}, *sys.orig_argv[3:]])
"""


def stub_path(folder: Path) -> str:
    """A value of PYTHONPATH with which the kit's commands are the stub."""
    (folder / "stub.py").write_text(STUB)
    (folder / "sitecustomize.py").write_text(SITE.format(stub=str(folder / "stub.py")))
    return os.pathsep.join((str(folder), str(ROOT)))


class Client(httpx.Client):
    """A client with the token."""

    def __init__(self, address: str, token: str = TOKEN) -> None:
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        super().__init__(base_url=address, headers=headers, timeout=120)

    def start(self, stage: str = "pretrain", **fields: Any) -> str:
        """Start a job; its id."""
        reply = self.post("/api/jobs", json={"stage": stage, **fields})
        assert reply.status_code == 201, reply.text
        return str(reply.json()["id"])

    def job(self, name: str) -> dict[str, Any]:
        """A job."""
        found: dict[str, Any] = self.get(f"/api/jobs/{name}").json()
        return found

    def until(self, name: str, *states: str, seconds: float = 60) -> dict[str, Any]:
        """Wait until a job has one of these states."""
        return self.wait(name, lambda job: job["state"] in states, seconds)

    def rows(self, name: str, least: int, seconds: float = 60) -> list[dict[str, Any]]:
        """Wait until a job has so many rows of metrics; return them."""
        found: list[dict[str, Any]] = []

        def is_done(job: dict[str, Any]) -> bool:
            found[:] = self.get(f"/api/jobs/{name}/metrics").json()["rows"]
            return len(found) >= least

        self.wait(name, is_done, seconds)
        return found

    def wait(self, name: str, is_done: Callable[[dict[str, Any]], bool], seconds: float = 60) -> dict[str, Any]:
        """Wait until a job is as it should be."""
        end = time.monotonic() + seconds
        while not is_done(job := self.job(name)):
            assert time.monotonic() < end, job
            time.sleep(0.05)
        return job

    def events(self, path: str, last: str = "") -> Generator[tuple[str, str, Any], None, None]:
        """Events of a stream: id, kind, data."""
        headers = {"Last-Event-ID": last} if last else {}
        with self.stream("GET", path, headers=headers) as reply:
            assert reply.status_code == 200
            found: dict[str, str] = {}
            for line in reply.iter_lines():
                name, _, text = line.partition(": ")
                if line and name:
                    found[name] = text
                elif found:
                    if "data" in found:
                        yield found.get("id", ""), found.get("event", "message"), json.loads(found["data"])
                    found = {}


@contextmanager
def manager(jobs: Path, *flags: str, **environment: str) -> Iterator[tuple[Client, subprocess.Popen[str]]]:
    """A manager as a program; it is killed at the end, unless it has ended before."""
    process = subprocess.Popen(
        [sys.executable, "-c", "from minimind_mcore.cli import main; main()", "manager", "--port", "0",
         "--jobs", str(jobs), *flags],
        env={**os.environ, "PYTHONPATH": str(ROOT), "DEVICE": "cpu", "TOKEN": TOKEN, **environment},
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert process.stderr is not None
        lines = []
        for line in process.stderr:
            lines.append(line)
            if line.startswith("manager "):
                break
        else:
            raise AssertionError("".join(lines))
        address, _, token = lines[-1].split()[1].partition("/#token=")
        with Client(address, token) as client:
            yield client, process
    finally:
        process.kill()
        process.wait()


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


def job_request(**fields: Any) -> request.JobRequest:
    """A checked request; a long pretraining unless the fields say otherwise."""
    return request.read({"stage": "pretrain", "settings": LONG, **fields})


def alive(process: psutil.Process) -> bool:
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


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
