"""Chat through a pipe: history, thoughts, tool calls; and what an answer's text is taken apart into."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from helpers.engine import Corpus
from helpers.inference_models import open_model, write_model

from minimind_mcore.errors import UserError
from minimind_mcore.inference import main
from minimind_mcore.inference.chat import Session, run
from minimind_mcore.inference.detokenizer import detokenize
from minimind_mcore.inference.generation import Generator
from minimind_mcore.inference.loading import Loaded
from minimind_mcore.inference.prompts import PromptEncoder, from_text, read_prompts
from minimind_mcore.tools.process import Result
from minimind_mcore.tools.registry import Toolbox, open_tools, tool_of

TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory, corpus: Corpus) -> Loaded:
    return open_model(write_model(tmp_path_factory.mktemp("chat") / "model", "minimind3", corpus))


class Script(Generator):
    """Stands for a generator: gives answers that are written here, and keeps the prompts that it gets."""

    def __init__(self, tokenizer: Any, answers: Sequence[str]) -> None:
        self.tokenizer, self.answers, self.prompts = tokenizer, iter(answers), []

    def stream(self, prompt: Sequence[int]) -> Iterator[int]:
        self.prompts.append(self.tokenizer.decode(prompt))
        yield from self.tokenizer(next(self.answers))["input_ids"]


def chat(loaded: Loaded, session: Session, lines: str, *answers: str, thinking: bool | None = None) -> list[str]:
    """The prompts that the model sees while these lines are typed."""
    script = Script(loaded.tokenizer, answers)
    run(script, PromptEncoder(loaded.tokenizer, raw=False, thinking=thinking), session, io.StringIO(lines))
    return script.prompts


def test_a_pipe_keeps_the_history(loaded: Loaded, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = chat(
        loaded, Session(turns=1, system="be kind"), "a1\nb2\n\nc3\n/new\nd4\n/quit\ne5\n", "A", "B", "C", "D"
    )
    user, said = "<|im_start|>user\n{}<|im_end|>\n", "<|im_start|>assistant\n<think>\n\n</think>\n\n{}"
    system, end = "<|im_start|>system\nbe kind<|im_end|>\n", "<|im_end|>\n"
    assert prompts == [
        system + user.format("a1") + said.format(""),
        system + user.format("a1") + said.format("A") + end + user.format("b2") + said.format(""),
        system + user.format("b2") + said.format("B") + end + user.format("c3") + said.format(""),  # one turn back
        system + user.format("d4") + said.format(""),
    ]
    assert "you> a1\nA\nyou> b2\nB\n" in capsys.readouterr().out


def test_a_line_that_is_no_text_is_asked_for_again(
    loaded: Loaded, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever stdin does by itself with such bytes, which depends on the locale."""
    for errors in ("strict", "surrogateescape"):
        piped = io.BytesIO("a1\n光\n".encode() + "光合\n".encode("gbk") + b"b2\n")
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(piped, encoding="utf-8", errors=errors))
        script, session = Script(loaded.tokenizer, ["A", "B", "C"]), Session(turns=3)
        run(script, PromptEncoder(loaded.tokenizer, raw=False), session)
        assert [m["content"] for m in session.messages if m["role"] == "user"] == ["a1", "光", "b2"]
        assert len(script.prompts) == 3
        assert "the line is not in utf-8 and was ignored; write it again" in capsys.readouterr().err
    piped = io.BytesIO(b"a\n\n\xb9\xe2\n")
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(piped, encoding="utf-8"))
    with pytest.raises(UserError, match="stdin: prompt 2 is not in utf-8"):
        read_prompts([], None)
    with pytest.raises(UserError, match="a lone surrogate"):
        PromptEncoder(loaded.tokenizer, raw=False)(from_text("\ud800"))


def test_thoughts_are_set_apart(loaded: Loaded, capsys: pytest.CaptureFixture[str]) -> None:
    session = Session(turns=3)
    prompts = chat(loaded, session, "ab\ncd\n", "hm\n</think>\n\nyes", "</think>no", thinking=True)
    assert prompts[0].endswith("<|im_start|>assistant\n<think>\n")  # the template has opened the thought
    assert "<think>\nhm\n</think>\n\nyes<|im_end|>" in prompts[1]
    assert "[thinking] hm [/thinking]\nyes\n" in capsys.readouterr().out
    assert session.messages[1] == {"role": "assistant", "content": "yes", "reasoning_content": "hm"}


def test_tool_calls_are_printed_and_answered(loaded: Loaded, capsys: pytest.CaptureFixture[str]) -> None:
    call = '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": 2}}\n</tool_call>'
    session = Session(turns=3, tools=Toolbox([tool_of(TOOL)]))
    prompts = chat(loaded, session, "1+2?\n/tool 3\n", "wait " + call + "<tool_call>nonsense</tool_call>", "3")
    assert json.dumps(TOOL["function"]) in prompts[0]
    assert call + "<|im_end|>\n<|im_start|>user\n<tool_response>\n3\n</tool_response><|im_end|>" in prompts[1]
    out = capsys.readouterr().out
    assert 'wait <tool_call>nonsense</tool_call>\n[tool call] add({"a": 1, "b": 2})\n' in out


def test_a_chat_of_the_program_answers_each_line(
    tmp_path: Path, corpus: Corpus, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same question twice: greedy answers differ because the second has seen the first."""
    model = write_model(tmp_path / "model", "minimind3", corpus)
    flags = ["--load", str(model), "--task", "chat", "--max-new-tokens", "12", "--top-k", "1"]

    def answers(*more: str) -> list[str]:
        monkeypatch.setattr("sys.stdin", io.StringIO("abc\nabc\n"))
        main.main([*flags, *more])
        return [turn.strip() for turn in capsys.readouterr().out.split("you> abc\n")[1:]]

    first, second = answers()
    assert first and first != second
    assert answers("--history-turns", "0") == [first, first]
    assert first not in answers("--raw")  # no template


def test_a_chat_runs_tools_and_goes_on(loaded: Loaded, capsys: pytest.CaptureFixture[str]) -> None:
    """Two calls in one reply, a third in the next, then the answer; a tool that does not exist is reported."""
    product = '<tool_call>{"name": "calculate_math", "arguments": {"expression": "256*37"}}</tool_call>'
    wrong = '<tool_call>{"name": "nothing", "arguments": {}}</tool_call>'
    length = '<tool_call>{"name": "text_length", "arguments": {"text": "abc"}}</tool_call>'
    session = Session(turns=3, tools=open_tools("calculate_math,text_length"))
    prompts = chat(loaded, session, "256*37?\n", product + wrong, length, "9472")
    results = [message["content"] for message in session.messages if message["role"] == "tool"]
    assert results == [
        '{"result": "9472"}',
        '{"error": "there is no tool \'nothing\'; the tools are calculate_math, text_length"}',
        '{"characters": 3, "words": 1}',
    ]
    assert len(prompts) == 3 and "<tool_response>\n" + results[0] + "\n</tool_response>" in prompts[1]
    out = capsys.readouterr().out
    assert (
        out.index("[tool call] calculate_math") < out.index('[tool result] {"result": "9472"}') < out.index("\n9472\n")
    )


def call_of(name: str) -> str:
    return f'<tool_call>{{"name": "{name}", "arguments": {{}}}}</tool_call>'


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> Toolbox:
    """Tools that answer at once: the user answers ask_me and ask_you, and every other call returns its name."""
    names = ("ask_me", "ask_you", "calculate_math")
    tools = Toolbox([tool_of({"type": "function", "function": {"name": name}}) for name in names])

    def run_all(self: Toolbox, calls: Sequence[tuple[str, object]]) -> list[Result | None]:
        return [None if name.startswith("ask") else Result(json.dumps(name)) for name, _ in calls]

    monkeypatch.setattr(Toolbox, "run_all", run_all)
    return tools


def test_results_come_in_the_order_of_the_calls(loaded: Loaded, quick: Toolbox) -> None:
    reply = call_of("ask_me") + call_of("calculate_math") + call_of("ask_you")
    session = Session(turns=3, tools=quick)
    prompts = chat(loaded, session, "go\n/tool red\n/tool blue\n", reply, "done")
    assert [m["content"] for m in session.messages if m["role"] == "tool"] == ["red", '"calculate_math"', "blue"]
    assert len(prompts) == 2 and session.messages[-1]["content"] == "done"  # the model waits for both results
    session = Session(turns=3, tools=quick)
    chat(loaded, session, "go\nsomething else\n", reply, "done")
    results = [m["content"] for m in session.messages if m["role"] == "tool"]
    missing = '{"error": "the user gave no result"}'
    assert results == [missing, '"calculate_math"', missing] and session.messages[-2]["content"] == "something else"


def test_the_model_answers_after_the_last_round(
    loaded: Loaded, quick: Toolbox, capsys: pytest.CaptureFixture[str]
) -> None:
    session = Session(turns=3, tools=quick)
    prompts = chat(loaded, session, "go\n", *[call_of("calculate_math")] * 16, "the answer")
    assert len(prompts) == 17 and session.messages[-1]["content"] == "the answer"
    session = Session(turns=3, tools=quick)
    assert len(chat(loaded, session, "go\n", *[call_of("calculate_math")] * 17)) == 17
    assert "16 replies have called tools; the calls of this reply do not run" in capsys.readouterr().err


def test_characters_come_whole(loaded: Loaded) -> None:
    """No tokenizer of 512 ids has these characters: each is several tokens."""
    text = "光合作用 \U0001f469 é abc"
    pieces = list(detokenize(loaded.tokenizer(text)["input_ids"], loaded.tokenizer))
    assert "".join(pieces) == text
    assert "光" in pieces and not any("�" in piece for piece in pieces)


def test_tools_are_read_in_both_forms(tmp_path: Path) -> None:
    file = tmp_path / "tools.json"
    other = {"name": "other", "parameters": {"type": "object"}}
    file.write_text(json.dumps([TOOL, other]))
    assert open_tools(str(file)).definitions == [TOOL, {"type": "function", "function": other}]
    for content, message in (
        ("{", "not a readable JSON file"),
        ("[]", "an empty list"),
        ('[{"function": {}}]', "tool 1 is .*; expected"),
        ('["a"]', 'tool 1 is "a"; expected'),
        ('[{"function": {"name": "f"}}, {"function": "x"}]', 'tool 2 is {"function": "x"}; expected'),
    ):
        file.write_text(content)
        with pytest.raises(UserError, match=rf"--tools .*tools.json: {message}"):
            open_tools(str(file))
