"""Public tool-calling datasets become the conversations that are written here by hand."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from minimind_mcore.errors import UserError
from minimind_mcore.inference.toolcall import read_cases
from minimind_mcore.preprocess import tool_data
from minimind_mcore.preprocess.options import ChatOptions, Options
from minimind_mcore.preprocess.readers import Reject
from minimind_mcore.preprocess.stages import make_stage
from minimind_mcore.preprocess.tokenize import load_encoder, tokenizer_info

AS_IT_IS = ChatOptions(system_ratio=0.0, empty_think_ratio=1.0, thinking_ratio=0.0)
PRICE = {
    "name": "price",
    "description": "Stock price",
    "parameters": {"type": "object", "properties": {"symbol": {"type": "string"}}, "required": ["symbol"]},
}
NEWS = {"name": "news", "description": "News", "parameters": {"type": "object", "properties": {}}}
WRAPPED = [{"type": "function", "function": function} for function in (PRICE, NEWS)]
HEAD = (
    "<|im_start|>system\n\n\n# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
    "You are provided with function signatures within <tools></tools> XML tags:\n<tools>\n{}\n</tools>\n\n"
    "For each function call, return a json object with function name and arguments within <tool_call></tool_call> XML "
    'tags:\n<tool_call>\n{{"name": <function-name>, "arguments": <args-json-object>}}\n</tool_call><|im_end|>\n'
)
EMPTY = "<think>\n\n</think>\n\n"
BOTH = HEAD.format("\n".join(json.dumps(tool) for tool in WRAPPED))
A, B = (f'<tool_call>\n{{"name": "price", "arguments": {{"symbol": "{name}"}}}}\n</tool_call>' for name in ("AB", "CD"))
DIALOGUE = (
    f"{BOTH}<|im_start|>user\nPrices?<|im_end|>\n<|im_start|>assistant\n{EMPTY}Let me look.\n{A}\n{B}<|im_end|>\n"
    '<|im_start|>user\n<tool_response>\n{"price": 1}\n</tool_response>\n<tool_response>\n{"price": 2}\n</tool_response>'
    f"<|im_end|>\n<|im_start|>assistant\n{EMPTY}1 and 2.<|im_end|>\n"
)
ONE = (
    f"{BOTH}<|im_start|>user\nPrice?<|im_end|>\n<|im_start|>assistant\n{EMPTY}{A}<|im_end|>\n"
    '<|im_start|>user\n<tool_response>\n{"price": 1}\n</tool_response><|im_end|>\n'
    f"<|im_start|>assistant\n{EMPTY}It is 1.<|im_end|>\n"
)


def turn(name: str, value: str) -> dict[str, str]:
    return {"from": name, "value": value}


CALLS = [json.dumps({"name": "price", "arguments": {"symbol": name}}) for name in ("AB", "CD")]
EXPLAINED = (
    "You are a function calling AI model. Here are the tools: <tools> [{}] </tools> Use the schema "
    '{{"title": "FunctionCall", "type": "object", "properties": {{"name": {{"type": "string"}}}}}} and return '
    "<tool_call>\n{{\"arguments\": <args-dict>, \"name\": <function-name>}}\n</tool_call>"
).format(", ".join(json.dumps(tool) for tool in WRAPPED))  # fmt: skip
HERMES = {
    "id": "x",
    "conversations": [
        turn("system", EXPLAINED),
        turn("human", "Prices?"),
        turn("gpt", f"Let me look.\n<tool_call>\n{CALLS[0]}\n</tool_call>\n<tool_call>\n{CALLS[1]}\n</tool_call>\n"),
        turn(
            "tool", '<tool_response>\n{"price": 1}\n</tool_response>\n<tool_response>\n{"price": 2}\n</tool_response>'
        ),
        turn("gpt", "1 and 2."),
    ],
}
LITERALS = json.loads(json.dumps(HERMES))
LITERALS["conversations"][2]["value"] = "Let me look.\n" + "".join(
    f"<tool_call>\n{{'arguments': {{'symbol': '{name}'}}, 'name': 'price'}}\n</tool_call>\n" for name in ("AB", "CD")
)
GLAIVE = {
    "conversations": [
        turn("human", "Price?"),
        turn("function_call", CALLS[0]),
        turn("observation", '{"price": 1}'),
        turn("gpt", "It is 1."),
    ],
    "tools": json.dumps([PRICE, NEWS]),
}
SYSTEM = (
    "SYSTEM: You are a helpful assistant with access to the following functions. Use them if required -\n"
    + "\n\n".join(json.dumps(function, indent=4) for function in (PRICE, NEWS))
)
RAW = {
    "system": SYSTEM,
    "chat": 'USER: Price?\n\n\nASSISTANT: <functioncall> {"name": "price", "arguments": \'{"symbol": "AB"}\'} '
    '<|endoftext|>\n\n\nFUNCTION RESPONSE: {"price": 1}\n\n\nASSISTANT: It is 1. <|endoftext|>\n\n\n',
}
XLAM_TOOL = {
    "name": "live",
    "description": "Live giveaways",
    "parameters": {
        "kind": {"description": "Kind", "type": "str", "default": "game"},
        "ids": {"description": "Ids", "type": "List[int]"},
        "top": {"description": "", "type": "int, optional"},
    },
}
XLAM = {
    "id": 0,
    "query": "Where are 1 and 2?",
    "answers": json.dumps([
        {"name": "live", "arguments": {"kind": "beta", "ids": [1, 2]}}, {"name": "live", "arguments": {"ids": []}},
    ]),
    "tools": json.dumps([XLAM_TOOL]),
}  # fmt: skip
LIVE = (
    '{"type": "function", "function": {"name": "live", "description": "Live giveaways", "parameters": '
    '{"type": "object", "properties": {"kind": {"type": "string", "description": "Kind", "default": "game"}, '
    '"ids": {"type": "array", '
    '"description": "Ids"}, "top": {"type": "integer"}}, "required": ["ids"]}}}'
)
TWICE = (
    f"{HEAD.format(LIVE)}<|im_start|>user\nWhere are 1 and 2?<|im_end|>\n<|im_start|>assistant\n{EMPTY}"
    '<tool_call>\n{"name": "live", "arguments": {"kind": "beta", "ids": [1, 2]}}\n</tool_call>\n'
    '<tool_call>\n{"name": "live", "arguments": {"ids": []}}\n</tool_call><|im_end|>\n'
)
SCHEMA = (
    'Answer in JSON by this schema: {"title": "Person", "name": "person", "type": "object", "properties": '
    '{"name": {"type": "string"}}}'
)
JSON_MODE = {
    "conversations": [turn("system", SCHEMA), turn("human", "Who?"), turn("gpt", '{"name": "Ada"}')],
}
SCHEMED = (
    f"<|im_start|>system\n{SCHEMA}<|im_end|>\n<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\n{EMPTY}"
    '{"name": "Ada"}<|im_end|>\n'
)
PLAIN = f"<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n{EMPTY}Hello.<|im_end|>\n"


def sample(handler: str, record: object, tokenizer: str) -> tuple[Sequence[int], Sequence[int]]:
    options = Options("-", tokenizer, handler=handler, chat=AS_IT_IS)
    stage = make_stage(options, tokenizer_info(tokenizer), load_encoder(tokenizer, "tokenizers"))
    prepared = stage.prepare(record)
    assert not isinstance(prepared, Reject), prepared.reason
    encoded = stage.encode([prepared])
    return encoded.sequences["input_ids"][0].tolist(), encoded.sequences["labels"][0].tolist()


@pytest.mark.parametrize(
    ("handler", "record", "text"),
    [
        ("HermesToolHandler", HERMES, DIALOGUE),
        ("HermesToolHandler", LITERALS, DIALOGUE),
        ("HermesToolHandler", JSON_MODE, SCHEMED),
        ("HermesToolHandler", {**HERMES, "tools": json.dumps(WRAPPED)}, DIALOGUE),
        ("GlaiveToolHandler", GLAIVE, ONE),
        ("GlaiveToolHandler", {**GLAIVE, "tools": "", "system": SYSTEM}, ONE),
        ("GlaiveToolHandler", {"conversations": [turn("system", SYSTEM), *GLAIVE["conversations"]]}, ONE),
        ("GlaiveToolHandler", RAW, ONE),
        ("GlaiveToolHandler", {"system": "SYSTEM: no functions", "chat": "USER: Hi\n\n\nASSISTANT: Hello."}, PLAIN),
        ("GlaiveToolHandler", {"system": "", "chat": "USER: Hi\n\n\nASSISTANT: Say USER: or ASSISTANT: to me."},
         PLAIN.replace("Hello.", "Say USER: or ASSISTANT: to me.")),
        ("XlamToolHandler", XLAM, TWICE),
    ],
    ids="hermes literals json-mode column glaive field turn text plain marks xlam".split(),
)  # fmt: skip
def test_a_record_has_these_ids_and_labels(handler: str, record: object, text: str, tokenizer: str) -> None:
    encoded = AutoTokenizer.from_pretrained(tokenizer)(text, return_offsets_mapping=True)
    learned = [match.span(1) for match in re.finditer(r"<\|im_start\|>assistant\n(.*?<\|im_end\|>\n)", text, re.S)]
    labels = [
        token if any(start <= a and b <= end for start, end in learned) else -100
        for token, (a, b) in zip(encoded.input_ids, encoded.offset_mapping, strict=True)
    ]
    assert sample(handler, record, tokenizer) == (encoded.input_ids, labels)


@pytest.mark.parametrize(
    ("source", "record", "reason"),
    [
        ("hermes", {**HERMES, "tools": json.dumps([NEWS])}, "a tool is called that is not offered"),
        ("hermes", {"conversations": [turn("human", "a"), turn("gpt", "<tool_call>f(1)</tool_call>")]},
         "a call is not valid"),
        ("hermes", {"conversations": [turn("human", "a"), turn("bot", "b")]}, "turn 2 is from 'bot'"),
        ("glaive", {"conversations": [turn("human", "a"), turn("function_call", "{")]}, "a call is not valid"),
        ("glaive", {"system": "", "chat": "USER: a"}, "no message of the assistant"),
        ("xlam", {**XLAM, "answers": "[]"}, "field 'answers' has no calls"),
        ("xlam", {**XLAM, "tools": "[]"}, "a tool is called that is not offered"),
        ("xlam", {**XLAM, "tools": "["}, "field 'tools' is not valid JSON"),
    ],
)  # fmt: skip
def test_bad_records_are_counted_by_reason(
    source: str, record: dict[str, object], reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    file.write_text(f"{json.dumps(record)}\n{json.dumps(record)}\n")
    with pytest.raises(UserError, match="no record can be used; is --source"):
        tool_data.main(["--source", source, "--input", str(file), "--output", str(output)])
    assert f"left out: 2 records: {reason}" in capsys.readouterr().out
    assert len((tmp_path / "out.rejects.jsonl").read_text().splitlines()) == 2 and not output.exists()


def test_a_file_is_converted_and_split(tmp_path: Path, tokenizer: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A JSON array as hermes publishes it: the output gives the same ids, and the held-out part is a set of cases.

    Duplicates are left out, so that no record is both held out and kept. Records without tools are not held out.
    """
    file, output, cases = tmp_path / "in.json", tmp_path / "out.jsonl", tmp_path / "cases.jsonl"
    plain, *calling = [json.loads(json.dumps(HERMES)) for _ in range(19)]
    for number, record in enumerate(calling):
        record["conversations"][1]["value"] = f"Prices {number}?"
    plain["conversations"] = [turn("human", "Hi"), turn("gpt", "Hello.")]
    file.write_text(json.dumps([*calling, plain, *calling[:5], {"conversations": []}]))
    flags = ["--source", "hermes", "--input", str(file), "--output", str(output), "--held-out", str(cases)]
    tool_data.main([*flags, "--held-out-ratio", "0.2"])
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert "left out: 5 records: the same as an earlier record" in (said := capsys.readouterr().out)
    assert "1 records offer no tools and are not held out" in said
    found = read_cases(str(cases), seed=0)
    questions = [line["conversations"][1]["content"] for line in lines]
    first = calling[int(questions[0].removeprefix("Prices ").removesuffix("?"))]
    assert sample("MiniMindInstructionHandler", lines[0], tokenizer) == sample("HermesToolHandler", first, tokenizer)
    assert sorted([*questions[:-1], *(case.question for case in found)]) == sorted(f"Prices {n}?" for n in range(18))
    assert questions[-1] == "Hello." and len(found) == 4 and list(found[0].tools) == WRAPPED
    assert [(call.name, call.arguments) for call in found[0].calls] == [
        ("price", {"symbol": name}) for name in ("AB", "CD")
    ]
    tool_data.main(["--source", "minimind", "--input", str(output), "--output", str(tmp_path / "again.jsonl")])
    assert (tmp_path / "again.jsonl").read_text() == output.read_text()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--max-samples", "-1"], "--max-samples -1: expected a number of records of 1 or more"),
        (["--held-out", "./out.jsonl"], "--held-out ./out.jsonl: this file is also written for --output out.jsonl"),
        (["--held-out", "out.rejects.jsonl"], "this file is also written for --output out.jsonl"),
    ],
)
def test_wrong_flags_are_named(
    more: Sequence[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("in.jsonl").write_text(json.dumps(HERMES))
    with pytest.raises(UserError, match=message):
        tool_data.main(["--source", "hermes", "--input", "in.jsonl", "--output", "out.jsonl", *more])
    assert [file.name for file in tmp_path.iterdir()] == ["in.jsonl"]
