"""The training manager's API. A quick program stands for the trainings; test_manager_training.py has real ones."""

from __future__ import annotations

import json
import re
import socket
from pathlib import Path
from typing import Any

import httpx  # pyright: ignore[reportMissingImports]
import pytest
from helpers.engine import ROOT
from helpers.manager import SHORT, TOKEN, Client, manager

from minimind_mcore.errors import UserError
from minimind_mcore.manager.main import main

pytest_plugins = ("helpers.manager_fixtures",)


PATHS = (
    "GET /api/info", "GET /api/form/grpo", "GET /api/devices", "GET /api/datasets", "GET /api/checkpoints",
    "GET /api/tokenizers", "GET /api/jobs", "POST /api/jobs", "POST /api/plan", "GET /api/compare", "GET /api/jobs/x",
    "DELETE /api/jobs/x", "POST /api/jobs/x/stop", "POST /api/jobs/x/kill", "POST /api/jobs/x/resume",
    "POST /api/jobs/x/chat", "GET /api/jobs/x/events",
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
    assert sft["TP"]["limits"] == "1 or more"
    for stage in ("full_sft", "convert", "eval", "serve"):
        assert form(client, stage)["PRECISION"]["choices"] == ["auto", "bf16", "fp16", "fp32"]
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


def test_settings_of_the_manager_change_no_plan(tmp_path: Path, stub: str) -> None:
    (tmp_path / "full_sft.pth").write_bytes(b"0")
    own = {"TRAIN_ITERS": "3", "TASK": "mmlu", "FORMAT": "minimind", "PAD_HEAD_DIM": "128", "LR": "0.5"}
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
        host = "::1"  # which has brackets in an address
    except OSError:
        host = "127.0.0.1"
    with manager(tmp_path / "jobs", "--host", host, DATA_DIR=str(tmp_path), PYTHONPATH=stub, **own) as (client, _):
        assert client.base_url.host == host
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
    questions, evaluation = {"data": data}, {"stage": "eval", "weights": weights}
    prompts = ROOT / "minimind_mcore/pipeline/prompts.jsonl"
    for task, fields, flags in (
        ("", {}, f"--task quality --task-data-path {prompts}"),
        ("toolcall", {}, f"--task quality toolcall --task-data-path {prompts} minimind"),
        ("exact_match", questions, f"--task quality exact_match --task-data-path {prompts} {data}"),
    ):
        reply = client.post("/api/plan", json={**evaluation, **fields, "settings": {"TASK": task}})
        assert reply.json()["commands"][0].endswith(flags), reply.text
    for fields, message in (
        ({"settings": {"TASK": "mmlu"}}, "data: the task mmlu needs it"), (questions, "TASK: expected the task that"),
    ):  # fmt: skip
        reply = client.post("/api/plan", json={**evaluation, **fields})
        assert reply.status_code == 400 and reply.json()["error"].startswith(message), reply.text
    missing = client.post("/api/plan", json={"stage": "full_sft", "data": data})
    assert missing.status_code == 400 and missing.json()["error"].startswith("weights: the stage full_sft needs it")


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


def test_the_command_line_is_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*flags: str) -> str:
        with pytest.raises(UserError) as found:
            main(["--jobs", str(tmp_path / "jobs"), *flags])
        return str(found.value)

    assert "--port 70000" in refused("--port", "70000")
    assert "no such directory" in refused("--allow", str(tmp_path / "none"))
    assert "cpu-slots" in refused("--cpu-slots", "0")
    monkeypatch.setenv("TOKEN", "two words")
    assert "TOKEN" in refused()
    assert not (tmp_path / "jobs").exists()
