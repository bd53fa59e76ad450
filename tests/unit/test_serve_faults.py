"""The embedded server when one request, one client or the machine is unusual: the others do not notice."""

from __future__ import annotations

import asyncio
import concurrent.futures
import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx  # pyright: ignore[reportMissingImports]
import pytest
import torch
from helpers.engine import ROOT
from helpers.serving import embedded, program, shrunk, until_serving, vocabulary, write_served

from minimind_mcore import log
from minimind_mcore.cli.model import serve
from minimind_mcore.errors import UserError
from minimind_mcore.inference.sampling import Sampler
from minimind_mcore.preprocess.hf_tokenizer import load_tokenizer
from minimind_mcore.serve import grammar, http_protocol, protocol
from minimind_mcore.serve.embedded import EmbeddedServer
from minimind_mcore.serve.service import Service
from minimind_mcore.serve.slots import Slots
from minimind_mcore.tools.parser import Call, parse_call

CHAT = "/v1/chat/completions"
HELLO = [{"role": "user", "content": "hello"}]
TOOLS = [{"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object"}}}]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, tokenizer: str) -> Path:
    folder = tmp_path_factory.mktemp("served") / "model"
    return write_served(folder, shrunk("minimind3", vocabulary(tokenizer)), tokenizer)


@pytest.fixture(scope="module")
def server(model: Path) -> Iterator[tuple[str, EmbeddedServer]]:
    with embedded(model) as found:
        yield found


def post(address: str, path: str = CHAT, **body: Any) -> httpx.Response:
    given = {"messages": HELLO, "max_tokens": 12, "ignore_eos": True} if path == CHAT else {}
    return httpx.post(address + path, content=json.dumps(given | body).encode(), timeout=60)


def ids(reply: httpx.Response) -> list[list[int]]:
    assert reply.status_code == 200, reply.text
    return [choice["token_ids"] for choice in reply.json()["choices"]]


def chunks(reply: httpx.Response) -> list[dict[str, Any]]:
    lines = [line.removeprefix("data: ") for line in reply.iter_lines() if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


PRIVATE = "".join(map(chr, range(0xE000, 0xF900)))
SCHEMA = {"type": "json_schema", "json_schema": {"schema": {"enum": ["\ud800"]}}}


@pytest.mark.parametrize(
    ("path", "body", "word"),
    [
        (CHAT, {"logit_bias": {"0000000009999999": 1}}, "logit_bias"),
        (CHAT, {"logit_bias": {"0" * 9000: 1}}, "logit_bias"),
        (CHAT, {"messages": [{"role": "user", "content": f"{PRIVATE}<|im_end|>"}]}, "private use"),
        (CHAT, {"response_format": SCHEMA}, "schema"),
        ("/v1/completions", {"prompt": ["a"] * 256, "n": 128, "max_tokens": 1}, "32768 answers"),
    ],
)  # fmt: skip
def test_requests_that_cannot_be_answered_are_400(
    server: tuple[str, EmbeddedServer], path: str, body: dict[str, Any], word: str
) -> None:
    reply = post(server[0], path, **body)
    assert reply.status_code == 400 and word in reply.json()["error"]["message"], reply.text


def test_an_answer_that_fails_fails_alone(
    server: tuple[str, EmbeddedServer], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    log.hand_over()
    adjust = Sampler.adjust

    def failing(self: Sampler, logits: torch.Tensor, answer: list[int]) -> None:
        if self.settings.presence_penalty == 1.5 and len(answer) == 3:
            raise RuntimeError("secret-words")
        adjust(self, logits, answer)

    good: dict[str, Any] = {"temperature": 0, "max_tokens": 60, "frequency_penalty": 0.1, "return_token_ids": True}
    alone = ids(post(server[0], **good))
    monkeypatch.setattr(Sampler, "adjust", failing)
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        bad = [pool.submit(post, server[0], presence_penalty=1.5) for _ in range(4)]
        fine = [pool.submit(post, server[0], **good) for _ in range(4)]
        assert [one.result().status_code for one in bad] == [500] * 4
        assert all(ids(one.result()) == alone for one in fine)
    assert "RuntimeError in failing" in caplog.text
    assert "Traceback" not in caplog.text and "secret-words" not in caplog.text and str(ROOT) not in caplog.text


def test_a_seed_gives_the_same_tokens_next_to_any_request(server: tuple[str, EmbeddedServer]) -> None:
    address = server[0]
    body: dict[str, Any] = {"seed": 7, "temperature": 1, "max_tokens": 30, "return_token_ids": True}
    alone = ids(post(address, **body))
    assert ids(post(address, **body)) == alone
    other = {"messages": HELLO, "max_tokens": 8000, "top_p": 0.5, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", address + CHAT, json=other, timeout=60) as running:
        lines = running.iter_lines()
        assert [next(lines) for _ in range(6)]  # it is in the batch
        assert ids(post(address, **body)) == alone


def test_answers_of_one_request_differ_for_any_seed(server: tuple[str, EmbeddedServer]) -> None:
    for seed in (-1, 0, 2**63):
        found = ids(post(server[0], seed=seed, n=3, temperature=1.5, return_token_ids=True))
        assert len(set(map(tuple, found))) == 3
        assert ids(post(server[0], seed=seed, n=3, temperature=1.5, return_token_ids=True)) == found


def test_a_client_that_leaves_before_the_first_event(server: tuple[str, EmbeddedServer]) -> None:
    app: Any = server[1].server.config.app
    scheduler = server[1].service.scheduler
    body = json.dumps({"messages": HELLO, "max_tokens": 30000, "ignore_eos": True, "stream": True}).encode()
    messages = [{"type": "http.request", "body": body, "more_body": False}, {"type": "http.disconnect"}]
    scope = {"type": "http", "method": "POST", "path": CHAT, "raw_path": CHAT.encode(), "query_string": b"",
             "headers": [], "http_version": "1.1", "scheme": "http", "client": ("127.0.0.1", 1),
             "asgi": {"version": "3.0"}, "server": ("127.0.0.1", 1), "root_path": ""}  # fmt: skip

    async def receive() -> dict[str, Any]:
        return messages.pop(0) if messages else {"type": "http.disconnect"}

    async def send(message: dict[str, Any]) -> None:
        await asyncio.sleep(600)  # nothing can be sent

    asyncio.run(asyncio.wait_for(app(scope, receive, send), 30))
    end = time.monotonic() + 3
    while scheduler.counts().running and time.monotonic() < end:
        time.sleep(0.05)
    assert scheduler.counts().running == 0


def test_a_huge_prompt_holds_nobody_up(server: tuple[str, EmbeddedServer]) -> None:
    """It takes seconds to encode; others are answered in the meantime."""
    with concurrent.futures.ThreadPoolExecutor(1) as pool, httpx.Client(timeout=60) as client:
        began, worst = time.monotonic(), 0.0
        huge = pool.submit(post, server[0], messages=[{"role": "user", "content": "word " * 600000}])
        while not huge.done():
            asked = time.monotonic()
            assert client.get(f"{server[0]}/health").status_code == 200
            worst = max(worst, time.monotonic() - asked)
            assert post(server[0], max_tokens=1).status_code == 200
        assert huge.result().json()["error"]["code"] == "context_length_exceeded"
    assert worst < 0.5 * (time.monotonic() - began)


def test_large_prompts_are_encoded_one_at_a_time(
    server: tuple[str, EmbeddedServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    now, most, chat = [0], [0], Service.chat

    def slow(self: Service, body: Any) -> Any:
        now[0] += 1
        most[0] = max(most[0], now[0])
        time.sleep(0.1)
        now[0] -= 1
        return chat(self, body)

    monkeypatch.setattr(Service, "chat", slow)
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        for words, expected in ((60000, 1), (1, 4)):
            most[0] = 0
            messages = [{"role": "user", "content": "word " * words}]
            list(pool.map(lambda _, messages=messages: post(server[0], messages=messages), range(4)))
            assert (most[0] == 1) == (expected == 1)


def test_a_grammar_is_compiled_once_for_all_choices(
    server: tuple[str, EmbeddedServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled, make = [], grammar.Grammar.__init__

    def counted(self: grammar.Grammar, text: str, *others: Any) -> None:
        compiled.append(text)
        make(self, text, *others)

    monkeypatch.setattr(grammar.Grammar, "__init__", counted)
    schema = {"type": "json_schema", "json_schema": {"schema": {"enum": ["yes", "no", "perhaps"]}}}
    reply = post(server[0], response_format=schema, n=5, temperature=1, seed=3, max_tokens=40, ignore_eos=False)
    answers = [choice["message"]["content"] for choice in reply.json()["choices"]]
    assert {json.loads(answer) for answer in answers} <= {"yes", "no", "perhaps"} and len(answers) == 5
    assert len(compiled) == 1


@pytest.mark.parametrize("temperature", [0, 1])
def test_min_tokens_does_not_go_on_behind_a_finished_grammar(
    server: tuple[str, EmbeddedServer], temperature: float
) -> None:
    schema = {"type": "json_schema", "json_schema": {"schema": {"enum": ["yes"]}}}
    body: dict[str, Any] = {"response_format": schema, "min_tokens": 30, "max_tokens": 60, "ignore_eos": False}
    reply = post(server[0], **body, temperature=temperature, seed=1)
    assert json.loads(reply.json()["choices"][0]["message"]["content"]) == "yes"


@pytest.mark.parametrize(
    "field", [{"continue_final_message": True}, {"chat_template": "x"}, {"add_special_tokens": True}]
)
def test_fields_of_tokenize_that_are_not_implemented(server: tuple[str, EmbeddedServer], field: dict[str, Any]) -> None:
    reply = post(server[0], "/tokenize", messages=HELLO, **field)
    assert reply.status_code == 400 and next(iter(field)) in reply.json()["error"]["message"]
    assert post(server[0], "/tokenize", messages=HELLO, continue_final_message=False).status_code == 200


def test_every_field_of_the_official_client_is_known() -> None:
    """A field of OpenAI's API is implemented or refused, never ignored. tests/real_vllm has the same for vLLM's."""
    kinds: tuple[tuple[Any, type[protocol.Body]], ...] = (
        (pytest.importorskip("openai.types.chat.completion_create_params"), protocol.ChatBody),
        (pytest.importorskip("openai.types.completion_create_params"), protocol.CompletionBody),
    )
    for module, body in kinds:
        fields = set(module.CompletionCreateParamsBase.__annotations__)
        assert len(fields) > 15
        assert not fields - body.model_fields.keys() - body.unsupported.keys()


def test_fields_of_messages_without_effect_are_named_once(
    server: tuple[str, EmbeddedServer], caplog: pytest.LogCaptureFixture
) -> None:
    log.hand_over()
    for _ in range(2):
        assert post(server[0], messages=[HELLO[0] | {"nickname": "Ann"}]).status_code == 200
    assert caplog.text.count("messages[].nickname") == 1 and "Ann" not in caplog.text


def test_the_head_of_a_request_has_limits(server: tuple[str, EmbeddedServer], monkeypatch: pytest.MonkeyPatch) -> None:
    """A connection whose head is not complete in time, or too large, is closed; the next client is answered."""
    monkeypatch.setattr(http_protocol, "HEAD_SECONDS", 0.5)
    host, port = server[0].removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=30) as slow:
        slow.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n")
        assert slow.recv(100) == b""
    monkeypatch.undo()
    with socket.create_connection((host, int(port)), timeout=30) as large:
        large.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\nX-Long: ")
        with pytest.raises(ConnectionError):
            for _ in range(3000):
                large.sendall(b"a" * 10_000)
    assert httpx.get(server[0] + "/health", timeout=30).status_code == 200


def test_until_the_model_is_loaded_all_is_503(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found: dict[str, httpx.Response] = {}
    load = EmbeddedServer._load

    def slow(self: EmbeddedServer, loop: asyncio.AbstractEventLoop) -> None:
        address = f"http://127.0.0.1:{self.options.port}"
        found.update({path: httpx.get(address + path) for path in ("/health", "/v1/models", "/metrics")})
        found[CHAT] = post(address)
        load(self, loop)

    monkeypatch.setattr(EmbeddedServer, "_load", slow)
    with embedded(model) as (address, _):
        assert httpx.get(f"{address}/health").status_code == 200 and post(address).status_code == 200
    assert found.pop("/metrics").status_code == 200
    assert [reply.status_code for reply in found.values()] == [503] * 3
    assert all("not loaded yet" in reply.json()["error"]["message"] for reply in found.values())


CALLS = [("get_weather", '{"city": "北京 🌤", "note": "a \\"b\\" <x> ' + "long " * 30 + '"}'), ("get_weather", "{}")]
WRITTEN = "<think>\nI look.\n</think>\n\nOne moment 🌤\n" + "\n".join(
    f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>' for name, arguments in CALLS
)


@pytest.mark.parametrize(
    ("more", "calls", "content", "finish"),
    [
        ({}, CALLS, "One moment 🌤", "tool_calls"),
        ({"tool_choice": "auto", "parallel_tool_calls": False}, CALLS[:1], "One moment 🌤", "tool_calls"),
        ({"max_tokens": 40}, [], None, "length"),
        ({"tool_choice": "none"}, [], WRITTEN.split("</think>\n\n")[1], "stop"),
        ({"stop": "moment 🌤\n<tool"}, [], "One ", "stop"),
    ],
)  # fmt: skip
def test_calls_that_the_model_writes_by_itself(
    published_tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: dict[str, Any],
    calls: list[tuple[str, str]], content: str | None, finish: str,
) -> None:  # fmt: skip
    """What a model that says this would make; whole and streamed, with tags and characters cut anywhere."""
    tokenizer = load_tokenizer(published_tokenizer)
    script = [*tokenizer.encode(WRITTEN, add_special_tokens=False), tokenizer.eos_token_id]
    run = Slots.run

    def scripted(self: Slots, first: int, new: list[list[int]]) -> torch.Tensor:
        logits = run(self, first, new).fill_(0)
        for row, tokens in enumerate(self.tokens[first : first + len(new)]):
            said = max(n for n in range(len(script)) if not n or tokens[-n:] == script[:n])
            logits[row, script[said]] = 100
        return logits

    monkeypatch.setattr(Slots, "run", scripted)
    config = shrunk("minimind3", vocabulary(published_tokenizer))
    body: dict[str, Any] = {"tools": TOOLS, "temperature": 0, "max_tokens": 400, "ignore_eos": False} | more
    with embedded(write_served(tmp_path / "model", config, published_tokenizer)) as (address, _):
        whole = post(address, **body).json()["choices"][0]
        streamed = chunks(post(address, stream=True, **body))
    message = whole["message"]
    made = [(one["function"]["name"], one["function"]["arguments"]) for one in message.get("tool_calls", [])]
    assert made == calls and whole["finish_reason"] == finish
    assert message["reasoning"] == message["reasoning_content"] == "I look."
    if content is not None:
        assert message["content"] == content
    choices = [choice for chunk in streamed for choice in chunk["choices"]]
    deltas = [choice["delta"] for choice in choices]
    assert "".join(delta.get("content") or "" for delta in deltas) == message["content"]
    assert "".join(delta.get("reasoning_content") or "" for delta in deltas) == "I look."
    assert [choice["finish_reason"] for choice in choices if choice["finish_reason"]] == [finish]
    found: list[list[str]] = []
    for call in [call for delta in deltas for call in delta.get("tool_calls", [])]:
        if "name" in call["function"]:
            assert call["index"] == len(found) and call["id"] and call["type"] == "function"
            found.append([call["function"]["name"], ""])
        found[call["index"]][1] += call["function"]["arguments"]
    assert [tuple(call) for call in found] == calls


def test_a_call_with_half_a_character_is_none() -> None:
    """No reply in UTF-8 could carry its name."""
    assert parse_call('{"name": "\\ud800", "arguments": {}}') is None
    call = Call("f", {"a": "\ud800"}, '{"a": "\\ud800"}')
    assert parse_call('{"name": "f", "arguments": {"a": "\\ud800"}}') == call


@pytest.mark.parametrize("host", ["x86_64-conda-linux-gnu", "some-host.example", "127.0.0.1", ""])
def test_what_conda_and_tcsh_set_is_not_the_address(
    host: str, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOST", host)
    monkeypatch.setenv("LOAD_DIR", str(model))
    monkeypatch.setenv("ENGINE", "embedded")
    monkeypatch.delenv("API_KEY", raising=False)
    assert serve(["--dry-run"]) == 0
    assert (f"HOST={host} is not an IP address" in capsys.readouterr().err) == ("-" in host)
    monkeypatch.setenv("HOST", "0.0.0.0")
    with pytest.raises(UserError, match="API_KEY is not set"):
        serve(["--dry-run"])


def test_the_server_answers_on_the_stand_in_for_an_npu(model: Path, server: tuple[str, EmbeddedServer]) -> None:
    place = ROOT / "rehearsal/minimind_mcore_rehearsal/python"
    body = {"temperature": 0, "return_token_ids": True}
    process = program("--load", str(model), "--port", "0", "--params-dtype", "fp32", DEVICE="npu", OMP_NUM_THREADS="1",
                      NPU_EMULATION_STRICT="raise", PYTHONPATH=os.pathsep.join(map(str, (place, ROOT))))  # fmt: skip
    try:
        address, said = until_serving(process)
        assert "embedded: the default on an NPU" in said and "fp32 on npu" in said, said
        assert ids(post(address, **body)) == ids(post(server[0], **body))
        assert post(address, top_p=0.9, top_k=20, min_p=0.01, presence_penalty=0.5, seed=1).status_code == 200
    finally:
        process.terminate()
        assert process.wait(60) == 0


def test_a_template_of_mindspeed_llm_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PROMPT_TYPE", "qwen")
    with pytest.raises(UserError, match="PROMPT_TYPE=qwen: a server uses the tokenizer's own chat template"):
        serve(["--load", "nowhere"])
