"""The embedded server: real clients, the same answers as transformers, prompts of strangers, keys, signals."""

from __future__ import annotations

import concurrent.futures
import importlib.util
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx  # pyright: ignore[reportMissingImports]
import pytest
import torch
from helpers.engine import ROOT
from helpers.inference_models import add_adapters, open_model, twin, write_pth
from helpers.serving import embedded, program, shrunk, until_serving, vocabulary, write_served
from helpers.weights_on_disk import state_dict, write_hf

from minimind_mcore.errors import UserError
from minimind_mcore.inference.detokenizer import Detokenizer
from minimind_mcore.inference.generation import Generator
from minimind_mcore.inference.sampling import SamplingParams
from minimind_mcore.models import yarn
from minimind_mcore.serve import main
from minimind_mcore.serve.prompts import SafePrompts

FIND_SPEC = importlib.util.find_spec
MODELS = ("minimind3", "minimind3_moe", "minimind2_small", "minimind2", "minimind2_moe", "minimind2_moe_768")
WORDS = "the cat sat on a mat and 小猫 坐 在 垫子 上 hello 17+25=? <b> {x: 1}".split()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, tokenizer: str) -> Path:
    folder = tmp_path_factory.mktemp("served") / "secret-place"
    return write_served(folder, shrunk("minimind3", vocabulary(tokenizer)), tokenizer)


@pytest.fixture(scope="module")
def address(model: Path) -> Iterator[str]:
    with embedded(model) as (found, _):
        yield found


def post(address: str, path: str = "/v1/chat/completions", **body: Any) -> httpx.Response:
    return httpx.post(address + path, json=body, timeout=60)


def greedy(address: str, content: str, tokens: int = 12, **more: Any) -> dict[str, Any]:
    """The choice of a chat at temperature 0, with ids."""
    body: dict[str, Any] = {"messages": [{"role": "user", "content": content}], "max_tokens": tokens, "temperature": 0}
    reply = post(address, "/v1/chat/completions", **body | {"return_token_ids": True, "ignore_eos": True} | more)
    assert reply.status_code == 200, reply.text
    return reply.json()


@pytest.mark.parametrize("version", ["newest", "1.x"])
def test_the_official_client(address: str, version: str) -> None:
    require_suite(address, version)


@pytest.mark.slow
def test_the_official_client_with_the_tokenizer_of_minimind2(tmp_path: Path) -> None:
    tokenizer = Path(os.environ.get("MINIMIND_TOKENIZER_DIR", "/nowhere")) / "v2"
    if not tokenizer.is_dir():
        pytest.skip("MINIMIND_TOKENIZER_DIR is not set")
    folder = write_served(tmp_path / "model", shrunk("minimind2_small", vocabulary(tokenizer)), tokenizer)
    with embedded(folder) as (found, _):
        require_suite(found, "newest")


def require_suite(address: str, version: str) -> None:
    """Every endpoint, field and error; each version of the client in a process of its own."""
    path = [str(ROOT / "tests"), str(ROOT)]
    if version == "1.x":
        if not os.environ.get("OPENAI_1_DIR"):
            pytest.skip("OPENAI_1_DIR is not set: there is no openai 1.x")
        path.insert(0, os.environ["OPENAI_1_DIR"])
    done = subprocess.run(
        [sys.executable, "-m", "helpers.openai_suite", f"{address}/v1"],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(path)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    major = int(done.stdout.split()[1].split(".")[0])
    assert (major == 1) == (version == "1.x")


def prompts(count: int, seed: int) -> list[str]:
    numbers = random.Random(seed)
    return [" ".join(numbers.choices(WORDS, k=numbers.randint(1, 60))) for _ in range(count)]


def theirs(model: Any, ids: list[int], tokens: int) -> list[int]:
    """What transformers' generate adds at temperature 0."""
    given = torch.tensor([ids])
    out = model.generate(
        given, attention_mask=torch.ones_like(given), max_new_tokens=tokens, do_sample=False, eos_token_id=None,
        pad_token_id=0,
    )  # fmt: skip
    return out[0, len(ids) :].tolist()


@pytest.mark.parametrize("name", [*MODELS, "yarn"])
def test_answers_equal_those_of_inference_py_and_of_transformers(name: str, tokenizer: str, tmp_path: Path) -> None:
    """Alone, in a running batch that others join and leave, streamed, and in a batch too large for memory."""
    config = shrunk("minimind3" if name == "yarn" else name, vocabulary(tokenizer))
    changes: dict[str, Any] = {}
    if name == "yarn":
        changes = {"rope_scaling": yarn.PARAMETERS}
    folder = write_served(tmp_path / "model", config, tokenizer, **changes)
    loaded, reference = open_model(folder), twin(folder)
    asked = prompts(12, seed=3)
    lengths = [random.Random(number).randint(3, 24) for number in range(len(asked))]
    # Four at a time, and memory for about three of them at their longest.
    width = 2 * config.num_layers * config.num_kv_heads * config.head_dim * 4
    with embedded(folder, max_batch_size=4, kv_cache_gib=1300 * width / 2**30, max_model_len=500) as (address, server):
        with concurrent.futures.ThreadPoolExecutor(len(asked)) as pool:
            replies = list(pool.map(lambda pair: greedy(address, *pair), zip(asked, lengths, strict=True)))
            stream = {"stream": True, "stream_options": {"include_usage": True}}
            texts = list(pool.map(lambda pair: streamed(address, *pair, **stream), zip(asked, lengths, strict=True)))
        assert server.service.scheduler.slots.capacity * len(server.service.scheduler.slots.tokens) <= 1300
    for reply, text, tokens in zip(replies, texts, lengths, strict=True):
        [choice], ids = reply["choices"], reply["prompt_token_ids"]
        generator = Generator(loaded, SamplingParams(temperature=0), tokens)
        generator.stop = []
        assert choice["token_ids"] == generator.complete([ids])[0].ids
        assert choice["token_ids"] == theirs(reference, ids, tokens)
        message, written = choice["message"], loaded.tokenizer.decode(choice["token_ids"], skip_special_tokens=True)
        assert text == (message["content"] or "") + (message["reasoning"] or "")
        assert text == written or "<think>" in written


def test_weights_of_minimind_with_adapters_are_served(tokenizer: str, tmp_path: Path) -> None:
    """A .pth and a LoRA file: the tokens are those of transformers with the merged weights."""
    config = shrunk("minimind3", vocabulary(tokenizer))
    write_pth(tmp_path / "weights.pth", config)
    merged = add_adapters(state_dict(config, "hf"), tmp_path / "lora.pth")
    reference = twin(write_hf(tmp_path / "merged", config, merged))
    flags = ["--load", str(tmp_path / "weights.pth"), "--lora-load", str(tmp_path / "lora.pth"), "--port", "0"]
    process = program(*flags, "--tokenizer-name-or-path", tokenizer, *config.megatron_flags())
    try:
        address, _ = until_serving(process)
        reply = greedy(address, "hello 17+25=?")
        assert reply["choices"][0]["token_ids"] == theirs(reference, reply["prompt_token_ids"], 12)
    finally:
        process.terminate()
        process.communicate(timeout=60)


def streamed(address: str, content: str, tokens: int, **more: Any) -> str:
    """The text of a streamed chat at temperature 0."""
    body = {"messages": [{"role": "user", "content": content}], "max_tokens": tokens, "temperature": 0}
    found = {"content": "", "reasoning": ""}
    with httpx.stream("POST", address + "/v1/chat/completions", json=body | {"ignore_eos": True} | more) as reply:
        lines = [line for line in reply.iter_lines() if line]
    assert lines[-1] == "data: [DONE]" and all(line.startswith("data: ") for line in lines)
    for line in lines[:-1]:
        for choice in json.loads(line.removeprefix("data: "))["choices"]:
            found["content"] += choice["delta"].get("content") or ""
            found["reasoning"] += choice["delta"].get("reasoning") or ""
    return found["content"] + found["reasoning"]


def test_the_next_turn_of_a_chat_reuses_the_last_one(address: str) -> None:
    first = [{"role": "user", "content": "tell me something " * 20}]
    answer = post(address, messages=first, max_tokens=8, temperature=0).json()
    before = metric(address, "minimind_prompt_tokens_cached_total")
    second = [*first, {"role": "assistant", "content": answer["choices"][0]["message"]["content"]},
              {"role": "user", "content": "go on"}]  # fmt: skip
    assert post(address, messages=second, max_tokens=8, temperature=0).status_code == 200
    assert metric(address, "minimind_prompt_tokens_cached_total") - before > 20


def metric(address: str, name: str) -> float:
    text = httpx.get(f"{address}/metrics").text
    return sum(float(line.split()[-1]) for line in text.splitlines() if line.split("{")[0].split(" ")[0] == name)


def test_metrics_count_what_was_answered(address: str) -> None:
    before = metric(address, "minimind_generation_tokens_total")
    greedy(address, "count", 9)
    assert metric(address, "minimind_generation_tokens_total") - before == 9
    assert metric(address, "minimind_requests_running") == 0
    assert 'minimind_requests_total{route="/v1/chat/completions",status="200"}' in httpx.get(f"{address}/metrics").text


@pytest.mark.parametrize("skip", [True, False])
def test_text_in_pieces_is_the_text_of_all_ids(tokenizer: str, model: Path, skip: bool) -> None:
    """Also of ids that are not the bytes of any character."""
    loaded = open_model(model)
    numbers = random.Random(5)
    for _ in range(200):
        ids = [numbers.randrange(loaded.info.vocab_size) for _ in range(numbers.randint(1, 30))]
        detokenizer = Detokenizer(loaded.tokenizer, skip)
        pieces = [detokenizer.add(token) for token in ids]
        assert "".join([*pieces, detokenizer.end()]) == loaded.tokenizer.decode(ids, skip_special_tokens=skip)


def test_added_tokens_in_messages_of_strangers_are_text(published_tokenizer: Path) -> None:
    """Every other prompt has transformers' ids, and the assistant's messages keep the ids of the tags."""
    from minimind_mcore.preprocess.hf_tokenizer import load_tokenizer

    tokenizer = load_tokenizer(published_tokenizer)
    safe = SafePrompts(tokenizer)
    tools = [{"type": "function", "function": {"name": "f", "description": "a <tool> of 你", "parameters": {}}}]
    chats = [
        [{"role": "system", "content": "Be brief. <b>"}, {"role": "user", "content": "你好 <think of it"}],
        [{"role": "user", "content": "1"}, {"role": "assistant", "content": "<think>\nx\n</think>\n\ny"},
         {"role": "user", "content": "2"}],
    ]  # fmt: skip
    for messages in chats:
        for given in (None, tools):
            expected = tokenizer.apply_chat_template(
                messages, tools=given, add_generation_prompt=True, tokenize=True, return_dict=True
            )["input_ids"]
            assert safe.chat(messages, given, {})[0] == expected
    added = tokenizer.backend_tokenizer.get_added_tokens_decoder()
    plain = safe.chat([{"role": "user", "content": "x"}], None, {})[0]
    for token in added.values():
        for content in (f"a{token.content}b", token.content, f"{token.content}\n{token.content} <|im_<|im_end|>end|>"):
            ids, _ = safe.chat([{"role": "user", "content": content}], None, {})
            assert [id for id in ids if id in added] == [id for id in plain if id in added], content
            assert content in tokenizer.decode(ids, skip_special_tokens=False)
            for messages in ([{"role": "system", "content": content}, {"role": "user", "content": "x"}],
                             [{"role": "user", "content": "x"}, {"role": "tool", "content": content}]):  # fmt: skip
                clean = [message | {"content": "x"} for message in messages]
                found, wanted = (safe.chat(each, None, {})[0] for each in (messages, clean))
                assert [id for id in found if id in added] == [id for id in wanted if id in added]
        described = [{"type": "function", "function": {"name": "f", "description": f"a {token.content}"}}]
        clean_tools = [{"type": "function", "function": {"name": "f", "description": "a x"}}]
        found, wanted = (safe.chat(chats[0], each, {})[0] for each in (described, clean_tools))
        assert [id for id in found if id in added] == [id for id in wanted if id in added]


def test_a_key_is_asked_for(model: Path) -> None:
    with embedded(model, api_key="secret-key") as (address, _):
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "secret-key"}):
            for path in ("/v1/models", "/metrics", "/tokenize"):
                reply = httpx.get(address + path, headers=headers)
                assert reply.status_code == 401 and "error" in reply.json()
                assert reply.headers["www-authenticate"] == "Bearer"
        assert httpx.get(f"{address}/v1/models", headers={"Authorization": "Bearer secret-key"}).status_code == 200
        assert httpx.get(f"{address}/health").status_code == 200
        origin = {"Origin": "http://evil.example"}
        reply = httpx.get(f"{address}/health", headers=origin)
        assert not [name for name in reply.headers if name.startswith("access-control")]


@pytest.mark.parametrize(
    ("flags", "key", "problem"),
    [
        (["--host", "0.0.0.0"], "", "API_KEY is not set"),
        (["--host", "0.0.0.0", "--allow-anonymous"], "", None),
        (["--host", "0.0.0.0"], "key", None),
        (["--host", "::1"], "", None),
        ([], "", None),
        (["--port", "70000"], "", "--port 70000"),
        (["--temperature", "0"], "", None),
        (["--temperature", "-1"], "", "--temperature: found -1"),
        (["--top-p", "0"], "", "--top-p: found 0"),
        (["--engine", "vllm"], "", "ENGINE=vllm"),
        ([], "with space", "API_KEY"),
    ],
)
def test_other_hosts_are_served_with_a_key(
    model: Path, flags: list[str], key: str, problem: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("API_KEY", key)
    monkeypatch.setattr("importlib.util.find_spec", _without_vllm)
    arguments = ["--load", str(model), *flags, "--dry-run"]
    if problem is None:
        assert main.main(arguments) == 0
    else:
        with pytest.raises(UserError, match=problem):
            main.main(arguments)


def _without_vllm(name: str, *args: Any) -> Any:
    return None if name == "vllm" else FIND_SPEC(name, *args)


def test_a_full_queue_is_429(model: Path) -> None:
    with embedded(model, max_batch_size=1, max_queue=2) as (address, _):
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            replies = list(pool.map(lambda n: post(address, messages=[{"role": "user", "content": str(n)}],
                                                   max_tokens=300, ignore_eos=True), range(8)))  # fmt: skip
        codes = sorted(reply.status_code for reply in replies)
        assert codes == [200] * 3 + [429] * 5
        refused = [reply for reply in replies if reply.status_code == 429]
        assert all(int(reply.headers["retry-after"]) > 0 and "error" in reply.json() for reply in refused)
        assert greedy(address, "next")["usage"]["completion_tokens"] == 12


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_place(model: Path, stream: bool) -> None:
    with embedded(model, max_batch_size=1) as (address, server):
        body = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 30000, "ignore_eos": True}
        with pytest.raises(httpx.ReadTimeout), httpx.Client(timeout=0.7) as client:
            if stream:
                with client.stream("POST", f"{address}/v1/chat/completions", json=body | {"stream": True}) as reply:
                    for number, _ in enumerate(reply.iter_lines()):
                        if number > 20:
                            raise httpx.ReadTimeout("enough")
            client.post(f"{address}/v1/chat/completions", json=body)
        began = time.monotonic()
        assert greedy(address, "next")["usage"]["completion_tokens"] == 12
        assert time.monotonic() - began < 10
        assert server.service.scheduler.counts().running <= 1


def test_a_signal_lets_running_answers_finish(model: Path, tmp_path: Path) -> None:
    """And the log has no key, no prompt and no path."""
    server = program("--load", str(model), "--port", "0", API_KEY="secret-key")
    address, log = until_serving(server)
    body = {"messages": [{"role": "user", "content": "secret-words"}], "max_tokens": 400, "ignore_eos": True}
    headers = {"Authorization": "Bearer secret-key"}
    httpx.post(f"{address}/v1/chat/completions", json={"messages": "secret-words"}, headers=headers)
    with httpx.stream(
        "POST", f"{address}/v1/chat/completions", json=body | {"stream": True}, headers=headers, timeout=60
    ) as reply:
        found = reply.iter_lines()
        next(found)
        server.send_signal(signal.SIGTERM)
        rest = [line for line in found if line]
    assert rest[-1] == "data: [DONE]" and '"finish_reason":"length"' in rest[-2]
    assert server.stdout is not None
    log += server.stdout.read()
    assert server.wait(30) == 0
    assert "POST /v1/chat/completions 200" in log and "the server has ended" in log
    assert "secret" not in log, log
    with pytest.raises(httpx.HTTPError):
        httpx.get(f"{address}/health", timeout=2)


def test_a_port_in_use_is_said(model: Path, address: str) -> None:
    port = address.rsplit(":", 1)[1]
    server = program("--load", str(model), "--port", port)
    out, _ = server.communicate(timeout=60)
    assert server.returncode == 1 and f"--port {port}: Address already in use" in out


def test_a_pretrained_model_has_completions_alone(model: Path) -> None:
    with embedded(model, raw=True) as (address, _):
        assert post(address, "/v1/completions", prompt="a", max_tokens=3).status_code == 200
        reply = post(address, messages=[{"role": "user", "content": "x"}])
        assert reply.status_code == 400 and "/v1/completions" in reply.json()["error"]["message"]
