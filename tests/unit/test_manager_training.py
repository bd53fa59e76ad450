"""The manager with a real training: start, watch, stop, resume, chat."""

from __future__ import annotations

from pathlib import Path

import httpx  # pyright: ignore[reportMissingImports]
import pytest
from helpers.manager import manager

ONE = {"NPUS_PER_NODE": 1, "TP": 1, "MBS": 2, "GBS": 2, "SEQ_LENGTH": 32, "LOG_INTERVAL": 1, "EVAL_ITERS": 0}


@pytest.mark.timeout(280)
def test_a_training_from_start_to_chat(tmp_path: Path) -> None:
    with manager(tmp_path / "jobs", DATA_DIR=str(tmp_path / "data"), OMP_NUM_THREADS="1") as (client, _):
        body = {"stage": "pretrain", "settings": {**ONE, "TRAIN_ITERS": 4000, "--weight-decay": 0.2}}
        plan = client.post("/api/plan", json=body).json()
        assert plan["error"] == "" and "GiB per rank" in plan["facts"]["memory"], plan
        assert "1.7" in plan["facts"]["model"] and "4000 iterations" in plan["facts"]["batch"]
        name = client.start(**body)
        client.wait(name, lambda job: len(client.get(f"/api/jobs/{name}/metrics").json()["rows"]) > 20, seconds=120)
        assert client.post(f"/api/jobs/{name}/stop").json()["state"] == "stopping"
        job = client.until(name, "stopped", seconds=60)
        assert job["status"] == 130, client.get(f"/api/jobs/{name}/events?tail=20").text
        rows = client.get(f"/api/jobs/{name}/metrics").json()["rows"]
        saved = int((tmp_path / f"jobs/{name}/pretrain/checkpoints/latest_checkpointed_iteration.txt").read_text())
        assert rows[-1]["iteration"] == saved and {"lm_loss", "eta_seconds", "tokens_per_second"} <= rows[-1].keys()
        # A second learning rate is another job. This one continues where it has saved.
        client.post(f"/api/jobs/{name}/resume")
        client.wait(
            name, lambda job: client.get(f"/api/jobs/{name}/metrics").json()["rows"][-1]["iteration"] > saved, 120
        )
        resumed = client.get(f"/api/jobs/{name}/metrics").json()["rows"]
        assert [row["iteration"] for row in resumed][: saved + 1] == [*range(1, saved + 2)]
        assert resumed[:saved] == rows
        client.post(f"/api/jobs/{name}/stop")
        client.until(name, "stopped", seconds=60)
        started = client.post(f"/api/jobs/{name}/chat")
        assert started.status_code == 201, started.text
        server = client.wait(started.json()["id"], lambda job: job["ready"] or job["state"] == "failed", seconds=60)
        body = {"messages": [{"role": "user", "content": "1+1="}], "max_tokens": 3, "min_tokens": 3}
        assert httpx.post(f"{server['address']}v1/chat/completions", json=body).status_code == 401
        headers = {"Authorization": f"Bearer {server['api_key']}"}
        reply = httpx.post(f"{server['address']}v1/chat/completions", json=body, headers=headers, timeout=60)
        assert reply.status_code == 200 and reply.json()["usage"]["completion_tokens"] == 3
        client.post(f"/api/jobs/{server['id']}/stop")
        client.until(server["id"], "stopped")
