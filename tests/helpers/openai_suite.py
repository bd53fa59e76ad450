"""What OpenAI's official client may do with a server: every endpoint, field and error.

    PYTHONPATH=tests python -m helpers.openai_suite http://127.0.0.1:8998/v1 [--vllm]

A program, so that each version of the client can be tried in a process of its own. `--vllm` says that the server is
vLLM 0.32: a case in a `differs` block must then fail, and the block says why vLLM is not like OpenAI there.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import openai  # pyright: ignore[reportMissingImports]

from minimind_mcore.tools.cases import Case, Expected
from minimind_mcore.tools.process import Limits
from minimind_mcore.tools.registry import Toolbox, tool_of

CHECKS: dict[str, Callable[[Any], None]] = {}
VLLM = "--vllm" in sys.argv
MINIMIND = {"chat_template_kwargs": {"open_thinking": True}, "reasoning_effort": "medium"}  # of its chat_api.py
HELLO = [{"role": "user", "content": "hello"}]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": "something",
            "strict": True,  # vLLM follows the schema only then
            "parameters": {
                "type": "object",
                "properties": {"unit": {"enum": ["celsius", "fahrenheit"]}},
                "required": ["unit"],
                "additionalProperties": False,
            },
        },
    }
    for name in ("get_weather", "get_time")
]


def check(function: Callable[[Any], None]) -> Callable[[Any], None]:
    """Register a check."""
    CHECKS[function.__name__] = function
    return function


@contextmanager
def differs(reason: str) -> Iterator[None]:
    """A case that holds for every server but vLLM; there it must fail, for this reason."""
    try:
        yield
    except (AssertionError, AttributeError, KeyError, TypeError, ValueError, openai.APIError) as error:
        if not VLLM:
            raise
        print(f"vLLM differs: {reason} ({type(error).__name__})")
    else:
        assert not VLLM, f"vLLM no longer differs: {reason}"


@contextmanager
def refused(status: int, word: str = "", param: str | None = None) -> Iterator[None]:
    """A request fails with this status, and a message that has the word."""
    try:
        yield
    except openai.APIStatusError as error:
        assert error.status_code == status, (error.status_code, error.message)
        assert word in error.message, error.message
        body: Any = error.body
        assert isinstance(body, dict) and {"message", "type", "param", "code"} <= set(body), body
        if param is not None and not VLLM:  # which leaves it null for what its engine finds
            assert body["param"] == param, body
    else:
        raise AssertionError(f"expected status {status}")


def chat(client: Any, **fields: Any) -> Any:
    """A short chat at temperature 0."""
    given = {"model": "minimind", "messages": HELLO, "max_tokens": 12, "temperature": 0}
    extra = fields.pop("extra_body", {}) | {"ignore_eos": fields.pop("ignore_eos", True)}
    return client.chat.completions.create(**given | fields, extra_body=extra)


def text_of(stream: Any) -> str:
    """The content of a stream."""
    return "".join(c.choices[0].delta.content or "" for c in stream if c.choices)


@check
def models(client: Any) -> None:
    listed = client.models.list().data
    assert [model.object for model in listed] == ["model"]
    with differs("it has no /v1/models/NAME"):
        assert client.models.retrieve(listed[0].id).id == listed[0].id
    assert chat(client, model=listed[0].id).model == listed[0].id
    with refused(404, "does not exist", "model"):
        chat(client, model="gpt-4o")


@check
def whole_chat(client: Any) -> None:
    reply = chat(client)
    assert reply.object == "chat.completion" and reply.id.startswith("chatcmpl-") and reply.created > 1e9
    [choice] = reply.choices
    assert choice.message.role == "assistant" and choice.message.content and choice.index == 0
    assert choice.finish_reason == "length" and choice.message.tool_calls is None
    assert reply.usage.completion_tokens == 12 and reply.usage.prompt_tokens > 0
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + 12
    assert reply.id != chat(client).id and chat(client).choices[0].message.content == choice.message.content


@check
def streamed_chat(client: Any) -> None:
    whole = chat(client)
    chunks = list(chat(client, stream=True, stream_options={"include_usage": True}))
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert len({(chunk.id, chunk.created, chunk.model) for chunk in chunks}) == 1
    assert chunks[0].choices[0].delta.role == "assistant"
    assert text_of(chunks) == whole.choices[0].message.content
    assert chunks[-1].choices == [] and chunks[-1].usage == whole.usage
    assert [c.choices[0].finish_reason for c in chunks[:-1] if c.choices[0].finish_reason] == ["length"]
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert len(chunks) > (2 if VLLM else 4)  # vLLM joins tokens that a slow client has not read


@check
def conversations(client: Any) -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "get_time", "arguments": '{"unit": "celsius"}'}}
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "12"},
        {"role": "assistant", "content": "noon", "reasoning_content": "twelve"},
        {"role": "user", "content": "and now?"},
    ]
    assert chat(client, messages=messages, tools=TOOLS).choices[0].message.content is not None
    picture = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x/y.png"}}]}]
    with refused(400, param="messages"):
        chat(client, messages=picture)
    with refused(400, param="messages"):
        chat(client, messages=[])
    with differs("any role is given to the chat template"), refused(400, param="messages"):
        chat(client, messages=[{"role": "robot", "content": "x"}])


@check
def stops(client: Any) -> None:
    text = chat(client).choices[0].message.content
    word = text[3:5]
    for stop in (word, [word, "never to be seen"]):
        reply = chat(client, stop=stop)
        assert reply.choices[0].finish_reason == "stop"
        assert reply.choices[0].message.content == text[: text.index(word)]
        assert text_of(chat(client, stop=stop, stream=True)) == text[: text.index(word)]
    kept = chat(client, stop=word, extra_body={"include_stop_str_in_output": True})
    assert kept.choices[0].message.content == text[: text.index(word) + len(word)]


@check
def choices(client: Any) -> None:
    reply = chat(client, n=3, temperature=1.5, seed=7)
    assert [choice.index for choice in reply.choices] == [0, 1, 2]
    texts = [choice.message.content for choice in reply.choices]
    assert len(set(texts)) == 3 and reply.usage.completion_tokens == 36
    found = ["", "", ""]
    for chunk in chat(client, n=3, temperature=1.5, seed=7, stream=True):
        for choice in chunk.choices:
            found[choice.index] += choice.delta.content or ""
    assert found == texts


@check
def seeds(client: Any) -> None:
    def drawn(seed: int | None) -> str:
        text: str = chat(client, temperature=1.5, seed=seed).choices[0].message.content
        return text

    assert drawn(1) == drawn(1) != drawn(2)
    assert drawn(None) != drawn(None)
    narrow = {"temperature": 2, "extra_body": {"top_k": 1}}
    assert chat(client, **narrow).choices[0].message.content == chat(client).choices[0].message.content
    assert chat(client, temperature=2, top_p=1e-9).choices[0].message.content == chat(client).choices[0].message.content


@check
def logprobs(client: Any) -> None:
    reply = chat(client, logprobs=True, top_logprobs=3)
    content = reply.choices[0].logprobs.content
    assert len(content) == 12
    for position in content:
        assert len(position.top_logprobs) == 3 and position.logprob <= 0
        assert position.top_logprobs[0].logprob == position.logprob  # greedy
    ordinary = [position for position in content if not position.token.startswith("<|")]  # special tokens have no text
    text = reply.choices[0].message.content
    is_whole = "\ufffd" not in text  # else the answer has a character that was never finished
    with nullcontext() if is_whole else differs("a token that is a part of a character has no bytes"):
        assert b"".join(bytes(position.bytes) for position in ordinary).decode(errors="replace") == text
    streamed = [chunk.choices[0].logprobs for chunk in chat(client, logprobs=True, stream=True) if chunk.choices]
    tokens = [position.token for found in streamed if found for position in found.content]
    assert tokens == [position.token for position in content]
    with refused(400, param="top_logprobs"):
        chat(client, logprobs=True, top_logprobs=21)
    with refused(400, "logprobs"):
        chat(client, top_logprobs=1)


@check
def penalties(client: Any) -> None:
    word = chat(client, logprobs=True).choices[0].logprobs.content[0].token
    ids = json.loads(raw(client, "tokenize", prompt=word, add_special_tokens=False))["tokens"]
    banned = chat(client, logprobs=True, logit_bias={str(token): -100 for token in ids})
    assert banned.choices[0].logprobs.content[0].token != word
    for field in ({"presence_penalty": 2}, {"frequency_penalty": 2}, {"extra_body": {"repetition_penalty": 5.0}}):
        reply = chat(client, max_tokens=40, logprobs=True, **field)
        tokens = [position.token for position in reply.choices[0].logprobs.content]
        plain = [p.token for p in chat(client, max_tokens=40, logprobs=True).choices[0].logprobs.content]
        assert len(set(tokens)) >= len(set(plain))


def raw(client: Any, path: str, **fields: Any) -> str:
    """A POST to an endpoint that the client does not know."""
    address = str(client.base_url).replace("/v1/", f"/{path}")
    text: str = client._client.post(address, json=fields, headers=client.auth_headers).text
    return text


def no_blanks(client: Any) -> dict[str, int]:
    """A logit bias against white space.

    vLLM's grammar of a call allows any amount of it, and random weights would write nothing else.
    """
    runs = ["".join(run) for length in range(1, 6) for run in itertools.product(" \n\r\t", repeat=length)]
    runs += ["\n" * lines + " " * spaces for lines in range(4) for spaces in range(40)]
    found = json.loads(raw(client, "tokenize", prompt=".".join(runs), return_token_strs=True))
    ids = [id for id, text in zip(found["tokens"], found["token_strs"], strict=True) if not text.strip("\n\r\t ĠĊčĉ")]
    return dict.fromkeys(map(str, ids), -100)


PLACES = {"location": {"enum": ["Tokyo", "Paris"]}}
PARAMETERS = {"type": "object", "properties": PLACES, "required": ["location"], "additionalProperties": False}
FUNCTION = {"name": "get_current_weather", "strict": True, "parameters": PARAMETERS}  # strict: see TOOLS
WEATHER = {"type": "function", "function": FUNCTION}


@check
def tool_evaluation(client: Any) -> None:
    """The evaluation of tool calls through the API; random weights call no tool."""
    from minimind_mcore.inference.toolcall import Api, evaluate, summary

    backend = Api(str(client.base_url), client.api_key, "minimind", max_tokens=12, seed=0)
    cases = [Case("hello", HELLO, [WEATHER], [Expected("get_current_weather")]), Case("talk", HELLO, [WEATHER], [])]
    outcomes, quality = evaluate(backend, cases, batch=2, seed=0)
    assert summary(outcomes)["called"] == (0, 1) and summary(outcomes)["not_called"] == (1, 1)
    assert quality.replies == 2 and (VLLM or outcomes[0].answer == outcomes[1].answer != "")


@check
def tool_loop(client: Any) -> None:
    """Three rounds: the model calls a tool, the tool runs, the model reads the result. Then the model answers."""
    toolbox, messages = Toolbox([tool_of(WEATHER)], Limits(seconds=60)), list[Any](HELLO)
    named = {"type": "function", "function": {"name": "get_current_weather"}}
    forced = {"tools": [WEATHER], "tool_choice": named, "logit_bias": no_blanks(client)}
    for _ in range(3):
        reply = chat(client, messages=messages, max_tokens=300, ignore_eos=False, **forced).choices[0].message
        [call] = reply.tool_calls
        result = toolbox.run(call.function.name, json.loads(call.function.arguments))
        assert result is not None and json.loads(result.text)["temperature"] in ("12°C", "10°C")
        messages += [reply, {"role": "tool", "tool_call_id": call.id, "content": result.text}]
    final = chat(client, messages=messages, tools=[WEATHER], tool_choice="none").choices[0].message
    assert final.content is not None and final.tool_calls is None and len(messages) == 7


@check
def tool_choices(client: Any) -> None:
    assert chat(client, tools=TOOLS).choices[0].message.content is not None
    assert chat(client, tools=TOOLS, tool_choice="auto").choices[0].message.content is not None
    assert chat(client, tools=TOOLS, tool_choice="none").choices[0].message.tool_calls is None
    named, bias = {"type": "function", "function": {"name": "get_time"}}, no_blanks(client)
    for choice, names in (("required", {"get_weather", "get_time"}), (named, {"get_time"})):
        # Without parallel_tool_calls vLLM may write several calls. The embedded server writes one forced call.
        wanted = {"tools": TOOLS, "tool_choice": choice, "max_tokens": 300, "ignore_eos": False,
                  "logit_bias": bias, "parallel_tool_calls": False}  # fmt: skip
        reply = chat(client, **wanted).choices[0]
        [call] = reply.message.tool_calls
        assert call.function.name in names and call.type == "function" and call.id
        assert json.loads(call.function.arguments)["unit"] in ("celsius", "fahrenheit")
        assert reply.finish_reason in ("tool_calls", "stop") and not reply.message.content
        found: dict[int, list[str]] = {}
        for chunk in chat(client, stream=True, **wanted):
            for delta in chunk.choices[0].delta.tool_calls or []:
                entry = found.setdefault(delta.index, ["", ""])
                entry[0] += delta.function.name or ""
                entry[1] += delta.function.arguments or ""
        [(index, (name, arguments))] = found.items()
        assert index == 0 and name == call.function.name
        assert json.loads(arguments) == json.loads(
            call.function.arguments
        )  # vLLM writes those of a stream as they came
    with refused(400, param="tool_choice"):
        chat(client, tools=TOOLS, tool_choice={"type": "function", "function": {"name": "unknown"}})
    with refused(400, param="tool_choice"):
        chat(client, tool_choice="required")


@check
def formats(client: Any) -> None:
    schema = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"], "additionalProperties": False}
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    reply = chat(client, response_format=form, max_tokens=200, ignore_eos=False).choices[0]
    assert json.loads(reply.message.content)["a"] in (1, 2) and reply.finish_reason == "stop"
    assert (
        chat(client, response_format={"type": "text"}).choices[0].message.content
        == chat(client).choices[0].message.content
    )
    with refused(400, param="response_format"):
        chat(client, response_format={"type": "xml"})


def has_a_switch(client: Any) -> bool:
    """Whether enable_thinking opens a thought in the prompt: in minimind-3's chat template, not in MiniMind2's."""
    given = [raw(client, "tokenize", messages=HELLO, chat_template_kwargs=kwargs)
             for kwargs in ({"enable_thinking": True}, {})]  # fmt: skip
    opened, plain = [json.loads(reply)["tokens"] for reply in given]
    return bool(opened != plain)


@check
def thinking(client: Any) -> None:
    """What opens a thought, and where it arrives."""
    closed: list[dict[str, Any]] = [{"reasoning_effort": "none"}, {"chat_template_kwargs": {"enable_thinking": False}}]
    if not has_a_switch(client):  # the model decides; enable_thinking only closes the thought
        for extra in (MINIMIND, {"chat_template_kwargs": {"enable_thinking": True}}, *closed):
            reply = chat(client, extra_body=extra)
            assert reply.choices[0].message.content and not getattr(reply.choices[0].message, "reasoning", None)
            assert (reply.usage.prompt_tokens > chat(client).usage.prompt_tokens) == (extra in closed)
        return
    for extra in (MINIMIND, {"chat_template_kwargs": {"enable_thinking": True}}, {"reasoning_effort": "high"}):
        reply = chat(client, extra_body=extra).choices[0].message
        assert reply.reasoning and not reply.content, reply
        streamed = [chunk.choices[0].delta for chunk in chat(client, extra_body=extra, stream=True) if chunk.choices]
        assert "".join(getattr(delta, "reasoning", None) or "" for delta in streamed) == reply.reasoning
        with differs("a thought is `reasoning` alone, not `reasoning_content`"):
            assert reply.reasoning_content == reply.reasoning
    with differs("its parser does not know open_thinking: the thought stays in the content"):
        assert chat(client, extra_body={"chat_template_kwargs": {"open_thinking": True}}).choices[0].message.reasoning
    for extra in closed:
        assert chat(client, extra_body=extra).choices[0].message.content
    usage = chat(client, extra_body={"chat_template_kwargs": {"enable_thinking": True}}).usage
    assert usage.completion_tokens_details.reasoning_tokens == 12


@check
def the_client_of_minimind(client: Any) -> None:
    """Two turns of MiniMind's chat_api.py."""
    messages: list[dict[str, str]] = []
    thinks = has_a_switch(client)
    for question in ("你好", "hello"):
        messages.append({"role": "user", "content": question})
        stream = client.chat.completions.create(
            model="minimind", messages=messages, stream=True, temperature=0.8, top_p=0.8, max_tokens=2048,
            extra_body=MINIMIND,
        )  # fmt: skip
        deltas = [chunk.choices[0].delta for chunk in stream if chunk.choices]
        content = "".join(delta.content or "" for delta in deltas)
        assert content or any(getattr(delta, "reasoning", None) for delta in deltas)
        if not thinks:
            assert content
        else:
            with differs("the client shows no thought, as it reads `reasoning_content` alone"):
                assert any(getattr(delta, "reasoning_content", None) for delta in deltas)
        messages.append({"role": "assistant", "content": content})


@check
def completions(client: Any) -> None:
    common = {"model": "minimind", "max_tokens": 8, "temperature": 0, "extra_body": {"ignore_eos": True}}
    reply = client.completions.create(prompt="one two", **common)
    assert reply.object == "text_completion" and reply.choices[0].finish_reason == "length"
    assert reply.usage.completion_tokens == 8
    streamed = "".join(c.choices[0].text for c in client.completions.create(prompt="one two", stream=True, **common))
    assert streamed == reply.choices[0].text
    ids = json.loads(raw(client, "tokenize", prompt="one two"))["tokens"]
    several = client.completions.create(prompt=["one two", "three"], **common)
    assert several.choices[0].text == reply.choices[0].text != several.choices[1].text
    several = client.completions.create(prompt=["one two", "three"], n=2, **common | {"temperature": 1.5, "seed": 1})
    assert [choice.index for choice in several.choices] == [0, 1, 2, 3]
    with differs("n greater than 1 is refused at temperature 0"):
        several = client.completions.create(prompt=["one two", "three"], n=2, **common)
        assert several.choices[0].text == several.choices[1].text == reply.choices[0].text != several.choices[2].text
    assert client.completions.create(prompt=ids, **common).choices[0].text == reply.choices[0].text
    scored = client.completions.create(prompt="one two", logprobs=2, **common).choices[0].logprobs
    assert len(scored.tokens) == len(scored.token_logprobs) == len(scored.top_logprobs) == 8
    for count in (0, 2):  # the token that was sampled is listed, however unlikely
        sampled = common | {"temperature": 2, "seed": 3, "max_tokens": 40, "logprobs": count}
        scored = client.completions.create(prompt="one two", **sampled).choices[0].logprobs
        for token, value, top in zip(scored.tokens, scored.token_logprobs, scored.top_logprobs, strict=True):
            assert len(top) <= count + 1 and token in top
            # vLLM gives every token that is a part of a character the text "". In `top` these tokens share one key.
            assert top[token] == value or (VLLM and not token)
    with refused(400):
        client.completions.create(prompt="x", suffix="y", **common)


@check
def limits(client: Any) -> None:
    both = {"max_completion_tokens": 5, "max_tokens": None}
    assert chat(client, **both).usage.completion_tokens == 5
    with refused(400, "context"):
        chat(client, messages=[{"role": "user", "content": "word " * 40000}])
    for field, value in {
        "temperature": -1, "top_p": 1.5, "max_tokens": 0, "n": 0, "presence_penalty": 9, "frequency_penalty": "x",
        "stop": [1], "seed": "a", "messages": "hello", "logit_bias": {"a": 1}, "tools": {},
    }.items():  # fmt: skip
        with refused(400):
            chat(client, **{field: value})
    with differs("words stand for true and false"), refused(400, param="stream"):
        chat(client, stream="yes")
    with refused(400, "min_tokens", "min_tokens"):
        chat(client, extra_body={"min_tokens": 13})


@check
def unknown_fields(client: Any) -> None:
    for field, value in {"prediction": {"type": "content", "content": "x"}, "store": True, "modalities": ["audio"],
                         "audio": {"voice": "a", "format": "wav"}, "functions": [{"name": "f"}]}.items():  # fmt: skip
        with differs("what it does not implement is ignored"), refused(400, field, field):
            chat(client, **{field: value})
    for name, extra in {"prompt_logprobs": 1, "use_beam_search": True, "echo": True}.items():
        with differs("it implements its own fields"), refused(400, name):
            chat(client, extra_body={name: extra})
    defaults = {"prompt_logprobs": None, "use_beam_search": False, "length_penalty": 1.0, "made_up": [1]}
    assert chat(client, extra_body=defaults, store=False).choices


@check
def other_endpoints(client: Any) -> None:
    root = str(client.base_url).removesuffix("v1/")
    assert client._client.get(f"{root}health").status_code == 200
    assert "_total" in client._client.get(f"{root}metrics", headers=client.auth_headers).text
    with differs("an unknown address has FastAPI's error"), refused(404):
        client.post("/nothing", cast_to=object)
    if os.environ.get("API_KEY"):
        other = client.with_options(api_key="other")
        with differs("the error of a wrong key is a word"), refused(401):
            chat(other)
        try:
            chat(other)
        except openai.AuthenticationError:
            return
        raise AssertionError("a wrong key is accepted")


@check
def tokens(client: Any) -> None:
    found = json.loads(raw(client, "tokenize", prompt="hello world", return_token_strs=True))
    assert found["count"] == len(found["tokens"]) == len(found["token_strs"]) and found["max_model_len"] > 0
    bare = json.loads(raw(client, "tokenize", prompt="hello world", add_special_tokens=False))["tokens"]
    assert json.loads(raw(client, "detokenize", tokens=bare))["prompt"] == "hello world"
    asked = json.loads(raw(client, "tokenize", messages=HELLO))
    assert asked["count"] == chat(client).usage.prompt_tokens


def main() -> None:
    """Run the checks; the exit status is 1 if one fails."""
    parser = argparse.ArgumentParser()
    parser.add_argument("address")
    parser.add_argument("--vllm", action="store_true", help="the server is vLLM")
    args = parser.parse_args()
    client = openai.OpenAI(base_url=args.address, api_key=os.environ.get("API_KEY", "any"), max_retries=0, timeout=120)
    failed = []
    for name, function in CHECKS.items():
        try:
            function(client)
        except Exception as error:
            import traceback

            traceback.print_exc()
            failed.append(f"{name}: {type(error).__name__} {str(error)[:300]}")
    print(f"openai {openai.__version__}: {len(CHECKS)} checks", *failed, sep="\n", flush=True)
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
