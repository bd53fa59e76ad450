"""The manager with real trainings: start, watch, stop, resume, chat."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import httpx  # pyright: ignore[reportMissingImports]
import pytest
from helpers.manager import manager
from helpers.reward_model import write_reward_model
from helpers.serving import write_served

from minimind_mcore.models.presets import PRESETS

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
        body = {"prompt": "1+1=", "max_tokens": 3, "min_tokens": 3}  # it is only pretrained
        assert httpx.post(f"{server['address']}v1/completions", json=body).status_code == 401
        headers = {"Authorization": f"Bearer {server['api_key']}"}
        reply = httpx.post(f"{server['address']}v1/completions", json=body, headers=headers, timeout=60)
        assert reply.status_code == 200 and reply.json()["usage"]["completion_tokens"] == 3
        client.post(f"/api/jobs/{server['id']}/stop")
        client.until(server["id"], "stopped")


RL = {
    "megatron_training.global_batch_size": 4, "megatron_training.seq_length": 128, "megatron_training.train_iters": 400,
    "rl_config.mini_batch_size": 4, "rl_config.n_samples_per_prompt": 2, "rl_config.max_prompt_length": 96,
    "generate_config.max_model_len": 128, "generate_config.sampling_config.max_tokens": 8,
    "actor_config.micro_batch_size": 2, "rl_config.actor_forward_micro_batch_size": 2,
    "rl_config.ref_forward_micro_batch_size": 2, "minimind.sample_interval": 1,
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_real_run_of_grpo_is_watched_stopped_and_resumed(tmp_path: Path) -> None:
    published = Path(os.environ.get("MINIMIND_TOKENIZER_DIR", "/nowhere")) / "v3"
    if not published.is_dir():
        pytest.skip("MINIMIND_TOKENIZER_DIR is not set")
    data = tmp_path / "data"
    write_served(data / "model", PRESETS["minimind3_tiny"], published)
    write_reward_model(data / "judge", published)
    turns = ({"conversations": [{"role": "user", "content": f"{n}+1=?"}, {"role": "assistant", "content": ""}]}
             for n in range(64))  # fmt: skip
    (data / "rlaif.jsonl").write_text("".join(json.dumps(turn) + "\n" for turn in turns))
    chosen = {"data": "rlaif.jsonl", "tokenizer": "model", "weights": "model", "reward_model": "judge"}
    body: dict[str, Any] = {name: str(data / path) for name, path in chosen.items()}
    body |= {"model": "minimind3_tiny", "settings": RL}
    flags = ("--trust-reward-models", "--allow", str(data))
    with manager(tmp_path / "jobs", *flags, DATA_DIR=str(data), OMP_NUM_THREADS="1") as (client, _):
        plan = client.post("/api/plan", json={"stage": "grpo", **body}).json()
        assert not plan["error"] and "GiB" in plan["facts"]["memory"], plan
        name = client.start("grpo", **body)
        output = tmp_path / "jobs" / name / "grpo"
        rows = client.rows(name, 3, seconds=400)
        assert all(-3 <= row["grpo/score/mean"] <= 6 and row["eta_seconds"] > 0 for row in rows)
        samples = client.get(f"/api/jobs/{name}/samples").json()["samples"]
        assert "+1=?" in samples[0]["prompt"] and {"response", "reward", "iteration"} <= samples[0].keys()
        assert client.post(f"/api/jobs/{name}/stop").json()["state"] == "stopping"
        assert client.until(name, "stopped", seconds=120)["status"] in (130, 143)
        saved = int((output / "checkpoints/latest_checkpointed_iteration.txt").read_text())
        before = client.rows(name, 1)
        assert before[-1]["iteration"] == saved
        client.post(f"/api/jobs/{name}/resume")
        after = client.rows(name, saved + 2, seconds=400)
        assert [row["iteration"] for row in after] == [*range(1, len(after) + 1)] and after[:saved] == before
        client.post(f"/api/jobs/{name}/kill")
        client.until(name, "stopped")
