"""The evaluation of tool calls, and the quality of replies, against a backend whose replies are written here."""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any, ClassVar

import pytest
from transformers import AutoTokenizer

from minimind_mcore.cli import model
from minimind_mcore.errors import UserError
from minimind_mcore.inference import evaluation
from minimind_mcore.inference.held_results import all_held, holds
from minimind_mcore.inference.prompts import Prompt, PromptEncoder
from minimind_mcore.inference.quality import Quality, repetition
from minimind_mcore.inference.toolcall import Api, Outcome, Reply, evaluate, read_cases, summary
from minimind_mcore.pipeline import sample
from minimind_mcore.preprocess import corpus, tool_dialogues, train_tokenizer
from minimind_mcore.preprocess.messages import conversation_of
from minimind_mcore.tools.cases import SETS, Case, Expected
from minimind_mcore.tools.parser import Call, parse
from minimind_mcore.tools.process import Result
from minimind_mcore.tools.registry import TOOLS, Toolbox


def called(name: str, **arguments: object) -> str:
    return f"<tool_call>{json.dumps({'name': name, 'arguments': arguments})}</tool_call>"


class Scripted:
    """Replies by the question, in turn; the last one again and again."""

    def __init__(self, replies: Mapping[str, Sequence[str]]) -> None:
        self.replies, self.seen = replies, list[Sequence[Mapping[str, object]]]()

    def reply(
        self, conversations: Sequence[tuple[Sequence[Mapping[str, object]], Sequence[Mapping[str, object]]]]
    ) -> list[Reply]:
        found = []
        for messages, _ in conversations:
            self.seen.append(messages)
            questions = [str(message["content"]) for message in messages if message["role"] == "user"]
            number = sum(message["role"] == "assistant" for message in messages)
            texts = self.replies.get(questions[-1], ["no idea"])
            text = texts[min(number, len(texts) - 1)]
            parsed = parse(text)
            found.append(Reply(parsed.answer, parsed.calls, parsed.message(), list(text.encode())))
        return found


WEATHER, PRODUCT, TIME, SELF = "北京今天天气怎么样？", "帮我计算 123 * 456", "现在几点了？", "请介绍一下你自己"
SEARCH, SHANGHAI = "搜索一下最新的Python版本", "上海的天气如何？"


def rates(replies: Mapping[str, Sequence[str]], cases: Sequence[Case]) -> dict[str, tuple[int, int]]:
    outcomes, _ = evaluate(Scripted(replies), cases, batch=4, seed=1)
    return summary(outcomes)


def test_every_rate_counts_what_it_says() -> None:
    replies = {
        WEATHER: [called("get_current_weather", location="北京"), "28°C, 晴"],  # all right
        PRODUCT: [called("calculate_math", expression="123 * 456"), "It is 56,088."],  # blanks and commas do not count
        TIME: [called("search", query="time"), "no idea"],  # another tool
        SELF: [called("search", query="me"), "I am"],  # a call where none is needed
        SEARCH: ["<tool_call>{broken", "ok"],  # a call that is not JSON
        SHANGHAI: [called("get_current_weather", city="北京"), "fine"],  # other arguments, by another name
    }
    assert rates(replies, SETS["minimind-ascend"](0)) == {
        "called": (5, 5),
        "right_tool": (3, 5),
        "exact": (2, 5),
        "not_called": (0, 1),
        "valid_json": (5, 6),
        "complete_arguments": (5, 6),
        "answer_holds_result": (2, 6),
    }


def test_results_go_back_and_rounds_are_bounded() -> None:
    [case] = [case for case in SETS["minimind"](0) if "平方" in case.question]
    first, second = called("random_number", min=1, max=1000), called("calculate_math", expression="7*7")
    answer = f"{random.Random('5 1 1000').randint(1, 1000)}, and 49"  # `builtin.random_number` with the seed 5
    backend = Scripted({case.question: [first, second, answer]})
    [outcome], quality = evaluate(backend, [case], batch=1, seed=5)
    assert (outcome.rounds, outcome.answer, quality.replies) == (2, answer, 3)
    assert outcome.rates == dict.fromkeys(
        ("called", "right_tool", "exact", "valid_json", "complete_arguments", "answer_holds_result"), True
    )
    assert [message["role"] for message in backend.seen[-1]] == ["user", "assistant", "tool", "assistant", "tool"]
    assert backend.seen[-1][-1]["content"] == '{"result": "49"}'
    [outcome], quality = evaluate(Scripted({case.question: [first]}), [case], batch=1, seed=5)
    assert outcome.rounds == 3 and quality.replies == 4  # a model that never stops calling


HELD: Sequence[tuple[str, dict[str, object], dict[str, object], str, bool]] = (
    ("unit_converter", {"value": 30, "from_unit": "celsius"}, {"result": 54.0, "from": "30 celsius", "to": "f"},
     "30°C is 54°F", True),
    ("unit_converter", {"value": 100}, {"result": 62.1371, "from": "100 km", "to": "miles"},
     "Sorry, I cannot convert 100 km to miles.", False),
    ("get_exchange_rate", {"from_currency": "USD"}, {"from": "USD", "to": "USD", "rate": 1.0}, "1 USD = 1 USD", True),
    ("get_current_time", {}, {"datetime": "2025-03-07 14:30:00", "timezone": "Asia/Shanghai"},
     "我不知道 Asia/Shanghai 的时间", False),
    ("get_current_time", {}, {"datetime": "2025-03-07 14:30:00", "timezone": "Asia/Shanghai"}, "现在是14:30。", True),
    ("random_number", {}, {"result": 7}, "The number is 1750", False),
    ("random_number", {}, {"result": 7}, "x7, 0.7, 7.5 and -7", False),
    ("random_number", {}, {"result": 1234567}, "It is 1,234,567.", True),
    ("random_number", {}, {"result": 1234567}, "It is 1,234,568.", False),
    ("random_number", {}, {"result": 20}, "a number of 15-20", True),
    ("random_number", {}, {"result": -5}, "得到−5", True),
    ("calculate_math", {"expression": "2^90"}, {"result": str(2**90)}, f"{2**90:,}", True),
    ("calculate_math", {"expression": "2^90"}, {"result": str(2**90)}, f"{2**90 + 1:,}", False),
    ("get_current_weather", {"location": "北京"}, {"city": "北京", "temperature": "28°C", "condition": "晴"},
     "我的心晴朗", False),
    ("get_current_weather", {"location": "北京"}, {"city": "北京", "temperature": "28°C", "condition": "晴"},
     "北京今天 28 度，晴", True),
    ("text_length", {"text": "abc"}, {"characters": 3, "words": 1}, "It has 3 characters.", True),
    ("translate_text", {"text": "你好世界"}, {"translated_text": "Hello World"}, "It means: hello world!", True),
    ("shop", {"item": "tea", "size": "big"}, {"item": "tea", "order": "big tea", "place": "aisle B"}, "big tea", False),
    ("shop", {"item": "tea", "size": "big"}, {"item": "tea", "order": "big tea", "place": "aisle B"}, "aisle b", True),
    ("shop", {"item": "tea"}, {"item": "tea"}, "tea", True),  # the result has nothing else
)  # fmt: skip


@pytest.mark.parametrize(("name", "arguments", "result", "answer", "held"), HELD)
def test_an_answer_holds_a_result(
    name: str, arguments: dict[str, object], result: dict[str, object], answer: str, held: bool
) -> None:
    call = Call(name, arguments, "")
    assert holds(answer, TOOLS.get(name), call, json.dumps(result, ensure_ascii=False)) is held


def test_an_answer_must_hold_every_result() -> None:
    calls = [Call("random_number", {}, ""), Call("calculate_math", {"expression": "7*7"}, "")]
    results = ['{"result": 7}', '{"result": "49"}']
    assert all_held("7 and 49", TOOLS, calls, results)
    assert not all_held("49", TOOLS, calls, results) and not all_held("7", TOOLS, calls, results)
    assert all_held("7", TOOLS, calls, [results[0], '{"error": "too large"}'])  # the model called again after an error
    assert not all_held("too large", TOOLS, calls[:1], ['{"error": "too large"}']) and not all_held("a", TOOLS, [], [])


def test_an_oracle_is_exact_in_every_generated_case() -> None:
    cases = SETS["generated"](3)[:40]
    replies = {
        case.question: [*(called(call.name, **(call.arguments or {})) for call in case.calls), "done"] for case in cases
    }
    found = rates(replies, cases)
    assert found["exact"] == (36, 36) and found["not_called"] == (4, 4)
    assert SETS["generated"](3) == SETS["generated"](3) != SETS["generated"](4)
    assert all(name in TOOLS for case in SETS["generated"](3) for name in (call.name for call in case.calls))


def test_wrong_sets_and_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no such file; expected one, or minimind, minimind-ascend, generated"):
        read_cases("minimid", 0)
    (tmp_path / "cases.jsonl").write_text('{"conversations": [{"role": "user", "content": "a"}], "calls": []}\n')
    with pytest.raises(UserError, match="record 1: no tools; expected tools"):
        read_cases(str(tmp_path / "cases.jsonl"), 0)
    with pytest.raises(UserError, match="--backend api: expected --task toolcall and --api-model"):
        evaluation.main(["--backend", "api", "--task", "toolcall", "--task-data-path", "minimind"])


def offered(name: str, *arguments: str, aliases: Sequence[str] = ()) -> dict[str, Any]:
    properties = {argument: {"type": "string"} for argument in (*arguments, *aliases)}
    schema = {"type": "object", "properties": properties, "required": list(arguments)}
    return {"type": "function", "function": {"name": name, "parameters": schema}}


def played(definition: dict[str, Any], replies: Sequence[str], *expected: Expected) -> Outcome:
    case = Case("t", [{"role": "user", "content": "q"}], [definition], expected)
    [outcome], _ = evaluate(Scripted({"q": replies}), [case], batch=1, seed=1)
    return outcome


def test_a_case_ends_with_a_call_that_no_function_runs() -> None:
    """A second call, after an error instead of a result, would not be among the expected calls of public data."""
    call = called("price", symbol="AB")
    outcome = played(offered("price", "symbol"), [call, call, "1"], Expected("price", {"symbol": "AB"}))
    assert (outcome.rounds, len(outcome.calls), outcome.results) == (1, 1, [])
    assert outcome.rates == dict.fromkeys(("called", "right_tool", "exact", "valid_json", "complete_arguments"), True)


def test_a_model_that_calls_again_after_the_last_round_is_not_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Toolbox, "run_all", lambda self, calls: [Result('{"characters": 3}') for _ in calls])
    call, expected = called("text_length", text="abc"), [Expected("text_length", {"text": "abc"})] * 3
    definition = offered("text_length", "text")
    assert not played(definition, [call], *expected).rates["exact"]
    assert played(definition, [call, call, call, "3"], *expected).rates["exact"]


@pytest.mark.parametrize(
    ("name", "alias", "canonical"),
    [
        ("get_current_weather", "city", "location"),
        ("get_weather", "city", "location"),
        ("translate_text", "target_lang", "target_language"),
    ],
)
def test_required_arguments_are_compared_under_one_name(name: str, alias: str, canonical: str) -> None:
    for required in (alias, canonical):
        for written in (alias, canonical):
            outcome = Outcome(Case("t", [], [offered(name, required)], [Expected(name, {required: "x"})]))
            outcome.calls.append(Call(name, {written: "x"}, ""))
            outcome.results.append("1")
            assert outcome.rates["complete_arguments"] and outcome.rates["exact"], (required, written)
    outcome = Outcome(Case("t", [], [offered(name, alias)], [Expected(name)]), [Call(name, {}, "")], results=["1"])
    assert not outcome.rates["complete_arguments"]


@pytest.mark.parametrize(
    ("tool", "call", "message"),
    [
        (offered("f"), {"name": "g"}, "names the tool 'g', which the case does not offer; expected one of f. Correct"),
        (offered("f"), {"name": "f", "arguments": "{}"}, "of 'f' are \"{}\"; expected a JSON object, or none"),
        (offered("f"), {"arguments": {}}, "has no name; expected"),
        ({"type": "function"}, {"name": "f"}, "is not a definition; expected"),
    ],
)
def test_a_wrong_case_is_named(tool: dict[str, Any], call: dict[str, Any], message: str, tmp_path: Path) -> None:
    messages = [{"role": "system", "content": "", "tools": json.dumps([tool])}, {"role": "user", "content": "a"}]
    (tmp_path / "cases.jsonl").write_text(json.dumps({"conversations": messages, "calls": [call]}))
    with pytest.raises(UserError, match=f"record 1: .*{message}"):
        read_cases(str(tmp_path / "cases.jsonl"), 0)


def wrapped(monkeypatch: pytest.MonkeyPatch, argv: Sequence[str], **settings: str) -> dict[str, str]:
    """The flags that `minimind-mcore evaluate` passes to evaluation.py, with their values."""
    for name in ("BACKEND", "LOAD_DIR", "OUTPUT_DIR", "API_MODEL"):
        monkeypatch.delenv(name, raising=False)
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    passed = list[str]()
    monkeypatch.setattr(model, "run_here", lambda program, flags, dry=False: passed.extend(flags))
    model.evaluate(argv)
    return dict(zip(passed[::2], passed[1::2], strict=True))


def test_the_wrapper_gives_an_api_evaluation_a_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without LOAD_DIR and OUTPUT_DIR, the files are in outputs/API_MODEL/evaluation."""
    api = {"BACKEND": "api", "TASK": "toolcall", "TASK_DATA_PATH": "minimind-ascend"}
    found = wrapped(monkeypatch, [], API_MODEL="m", **api)
    assert found["--output-dir"] == str(model.outputs("m", "evaluation")) and found["--backend"] == "api"
    for name, folder in {"jingyaogong/minimind-3:latest": "jingyaogong-minimind-3-latest", "../..": "api"}.items():
        found = wrapped(monkeypatch, [], API_MODEL=name, **api)
        assert found["--output-dir"] == str(model.outputs(folder, "evaluation"))
    found = wrapped(monkeypatch, ["--backend", "api", "--api-model", "n"], LOAD_DIR="/models/x", API_MODEL="m")
    assert found["--output-dir"] == str(model.outputs("n", "evaluation")) and "--load" not in found
    assert wrapped(monkeypatch, [], OUTPUT_DIR="/o", API_MODEL="m", **api)["--output-dir"] == "/o"


def test_the_backend_flag_of_the_wrapper_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    found = wrapped(monkeypatch, ["--backend", "local"], LOAD_DIR="/models/x", BACKEND="api", API_MODEL="m")
    assert found["--load"] == "/models/x" and found["--output-dir"] == str(model.outputs("x", "evaluation"))
    assert found["--backend"] == "local" and "--api-model" not in found
    with pytest.raises(UserError, match="LOAD_DIR is not set"):
        wrapped(monkeypatch, ["--backend=local"])


class Answers(BaseHTTPRequestHandler):
    """OpenAI's API: calls the first tool that is offered with {}, then answers with the tool's result.

    With `ids`, every reply has these token ids; without, the field that asks for them is refused.
    """

    ids: ClassVar[dict[str, list[int]]] = {}

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        message: dict[str, object] = {"role": "assistant", "content": body["messages"][-1]["content"]}
        if body["messages"][-1]["role"] == "user":
            function = {"name": body["tools"][0]["function"]["name"], "arguments": '{"location": "北京"}'}
            message = {
                "role": "assistant",
                "content": None,
                "tool_calls": [{"id": "call_1", "type": "function", "function": function}],
            }
        else:
            assert body["messages"][-1]["tool_call_id"] == "call_1"
        choice = {"message": message, "finish_reason": "stop"}
        reply, status = json.dumps({"choices": [choice | self.ids]}).encode(), 200
        if "return_token_ids" in body and not self.ids:
            reply, status = b"unknown field", 400
        self.send_response(status)
        self.send_header("Content-Length", str(len(reply)))
        self.end_headers()
        self.wfile.write(reply)

    def log_message(self, format: str, *args: object) -> None:
        del format, args


@pytest.mark.parametrize("ids", [[5, 5, 5, 5, 5, 2], None])
def test_both_backends_count_tokens_or_leave_them_out(ids: list[int] | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last id is the end token. Words of the text are not counted: a Chinese sentence is one."""
    monkeypatch.setattr(Toolbox, "run_all", lambda self, calls: [Result('{"temperature": "28°C"}') for _ in calls])
    monkeypatch.setattr(Answers, "ids", {"token_ids": ids} if ids else {})
    server = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    Thread(target=server.serve_forever, daemon=True).start()
    api = Api(f"http://127.0.0.1:{server.server_port}/v1", "none", "m", 16, 1)
    _, quality = evaluate(api, SETS["minimind-ascend"](0)[:1], batch=1, seed=1)
    server.shutdown()
    metrics = {"repetition_4gram": 0.5, "tokens_per_reply": 5.0} if ids else {}
    assert quality.row() == {"replies": 2, "ended": 1.0, **metrics}


def test_a_server_is_judged_and_the_scores_are_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    Thread(target=server.serve_forever, daemon=True).start()
    flags = ["--backend", "api", "--api-base-url", f"http://127.0.0.1:{server.server_port}/v1", "--api-model", "m"]
    flags += ["--task", "toolcall", "--task-data-path", "minimind-ascend", "--output-dir", str(tmp_path)]
    evaluation.main(flags)
    server.shutdown()
    scores = json.loads((tmp_path / "scores.json").read_text())
    subjects = scores["accuracy"]["toolcall"]["subjects"]
    assert subjects["called"]["accuracy"] == 1 and subjects["right_tool"]["accuracy"] == 0.4
    assert subjects["exact"]["accuracy"] == 0.2 and scores["rounds"] == 1
    assert (tmp_path / "scores.png").stat().st_size > 1000
    assert len((tmp_path / "answers.jsonl").read_text().splitlines()) == 6
    assert "exact" in capsys.readouterr().out


def test_repetition_is_the_share_of_seen_ngrams() -> None:
    assert repetition("a b c d e f".split()) == 0
    assert repetition("a a a a a a a".split()) == pytest.approx(3 / 4)  # one distinct 4-gram of four
    assert repetition("a b a b a b".split(), n=2) == pytest.approx(3 / 5)
    assert repetition("a b".split()) == 0
    quality = Quality()
    quality.add(list("aaaaaaa"), finished=False)
    quality.add(list("abc"), finished=True)
    assert quality.row() == {"replies": 2, "repetition_4gram": 0.375, "ended": 0.5, "tokens_per_reply": 5.0}


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All sample texts, and the tokenizer, as the quickstart makes them."""
    folder = tmp_path_factory.mktemp("stage")
    for command in sample.data_job(folder).commands:
        {"corpus": corpus.main, "tokenizer": train_tokenizer.main}[command.words[0]](command.words[1:])
    return folder


def test_no_text_that_the_model_reads_holds_a_value_that_is_asked_for(stage: Path) -> None:
    """The texts of the quickstart before the stage, the text of the tokenizer, and the dialogues of the stage."""
    cases = [json.loads(line) for line in (stage / "tool_cases.jsonl").read_text(encoding="utf-8").splitlines()]
    assert {case["task"] for case in cases} == {"get_current_weather", "calculate_math", "random_number"}
    values = [str(value) for case in cases for value in case["calls"][0]["arguments"].values()]
    numbers = set(re.findall(r"\d+", " ".join(values)))
    towns = {value for value in values if value[0].isalpha()}
    assert {len(number) for number in numbers} == {3, 4} and len(numbers) > 100 and len(towns) > 10
    for name in ("sample", "drills", "dialogues", "preferences", "thoughts", "tools"):
        text = (stage / f"{name}.jsonl").read_text(encoding="utf-8")
        read = set(re.findall(r"\d+", text))
        assert len(read) > 80 and not numbers & read, name
        assert not [town for town in towns if town.lower() in text.lower()], name
    training = (stage / "tools.jsonl").read_text(encoding="utf-8")
    lengths = Counter(len(number) for number in re.findall(r"\d+", training))
    assert min(lengths[2], lengths[3], lengths[4]) > 10_000


def test_every_token_of_a_value_that_is_asked_for_occurs_in_the_dialogues(stage: Path) -> None:
    encoder = PromptEncoder(AutoTokenizer.from_pretrained(stage / "tokenizer"), raw=False, thinking=False)
    said: dict[str, object] = {"role": "assistant", "content": ""}

    def ids(record: dict[str, Any], *answer: dict[str, object]) -> set[int]:
        conversation = conversation_of(record, {"messages": "conversations"}, [*record["conversations"], *answer])
        return set(encoder(Prompt(list(conversation.messages), conversation.tools)))

    known = set.union(*map(ids, tool_dialogues.dialogues(42, 2000)))
    for case in tool_dialogues.held_out(42):
        call = {**said, "tool_calls": json.dumps(case["calls"], ensure_ascii=False)}
        assert ids(case, call) <= known
