"""The paths of minimind-ascend's manager."""

from __future__ import annotations

import asyncio
import itertools
import time
from pathlib import Path

import httpx  # pyright: ignore[reportMissingImports]
import pytest
from helpers.manager import LONG, TOKEN, Client

from minimind_mcore.manager import record
from minimind_mcore.manager.api import create_app
from minimind_mcore.manager.plan import Planner
from minimind_mcore.manager.queue import Queue
from minimind_mcore.tools.process import Result
from minimind_mcore.tools.registry import Toolbox

pytest_plugins = ("helpers.manager_fixtures",)


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
