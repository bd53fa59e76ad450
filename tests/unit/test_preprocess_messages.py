"""What is read of a record's messages: order, prompts, tools, thoughts, loss, content parts, keys that nothing reads.

The references use nothing of the kit: transformers renders and encodes, and the loss is found in the text by offsets.
"""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from transformers import AutoTokenizer

from minimind_mcore.errors import UserError
from minimind_mcore.inference.prompts import read_prompts
from minimind_mcore.preprocess.convert import convert
from minimind_mcore.preprocess.options import ChatOptions, Options
from minimind_mcore.preprocess.readers import Reject, ShardReader, find_sources, plan_shards
from minimind_mcore.preprocess.stages import Encoded, make_stage
from minimind_mcore.preprocess.tokenize import load_encoder, tokenizer_info

AS_IT_IS = ChatOptions(system_ratio=0.0, empty_think_ratio=1.0, thinking_ratio=0.0)
TIDE = {"name": "tide", "description": "潮位", "parameters": {"type": "object", "properties": {"port": {}}}}
TOOLS = [{"type": "function", "function": TIDE}]
CALLS = [{"name": "tide", "arguments": {"port": port}} for port in "AB"]
Turn = dict[str, Any]


def user(text: str, **fields: Any) -> Turn:
    return {"role": "user", "content": text, **fields}


def assistant(text: str, **fields: Any) -> Turn:
    return {"role": "assistant", "content": text, **fields}


def system(text: str, **fields: Any) -> Turn:
    return {"role": "system", "content": text, **fields}


def tool(text: str) -> Turn:
    return {"role": "tool", "content": text}


def said(name: str, text: str, **fields: Any) -> Turn:
    """A turn of ShareGPT."""
    return {"from": name, "value": text, **fields}


def text_of(tokenizer: str, messages: list[Turn], tools: list[Any] | None = None, **options: Any) -> str:
    reference = AutoTokenizer.from_pretrained(tokenizer)
    return str(reference.apply_chat_template(messages, tools=tools, tokenize=False, **options))


def ids_of(tokenizer: str, text: str) -> list[int]:
    ids: list[int] = AutoTokenizer.from_pretrained(tokenizer)(text, add_special_tokens=False).input_ids
    return ids


def expected(tokenizer: str, text: str, learned: list[int] | None = None) -> tuple[list[int], list[int]]:
    """Ids and labels of a written conversation; `learned` are the numbers of the answers that have a loss."""
    encoded = AutoTokenizer.from_pretrained(tokenizer)(text, return_offsets_mapping=True)
    answers = [m.span(1) for m in re.finditer(r"<\|im_start\|>assistant\n(.*?<\|im_end\|>\n)", text, re.S)]
    answers = answers if learned is None else [answers[number] for number in learned]
    labels = [
        token if any(start <= a and b <= stop for start, stop in answers) else -100
        for token, (a, b) in zip(encoded.input_ids, encoded.offset_mapping, strict=True)
    ]
    return encoded.input_ids, labels


def encoded_by(handler: str, record: Any, tokenizer: str, chat: ChatOptions = AS_IT_IS) -> Encoded:
    options = Options("-", tokenizer, handler=handler, chat=chat)
    stage = make_stage(options, tokenizer_info(tokenizer), load_encoder(tokenizer, "tokenizers"))
    prepared = stage.prepare(record)
    assert not isinstance(prepared, Reject), prepared.reason
    encoded = stage.encode([prepared])
    assert not encoded.unusable
    return encoded


def sample(
    handler: str, record: Any, tokenizer: str, chat: ChatOptions = AS_IT_IS, side: str = ""
) -> tuple[list[int], list[int]]:
    """Ids and labels that a handler makes of a record."""
    found = encoded_by(handler, record, tokenizer, chat).sequences
    return found[f"{side}input_ids"][0].tolist(), found[f"{side}labels"][0].tolist()


def reason(handler: str, record: Any, tokenizer: str, chat: ChatOptions = AS_IT_IS) -> str:
    """Why a record is rejected."""
    options = Options("-", tokenizer, handler=handler, chat=chat)
    stage = make_stage(options, tokenizer_info(tokenizer), load_encoder(tokenizer, "tokenizers"))
    rejected = stage.prepare(record)
    assert isinstance(rejected, Reject), "the record is read"
    return rejected.reason


# ------------------------------------------------------------------ prompts

ASKED, GOOD, BAD = "第0座灯塔有几层？", "它有3层。", "不清楚。"
PAIRS: dict[str, dict[str, Any]] = {
    "messages": {"prompt": [user(ASKED)], "chosen": [assistant(GOOD)], "rejected": [assistant(BAD)]},
    "text and messages": {"prompt": ASKED, "chosen": [assistant(GOOD)], "rejected": [assistant(BAD)]},
    "texts": {"prompt": ASKED, "chosen": GOOD, "rejected": BAD},
    "the prompt is also in the sides": {
        **{"prompt": ASKED, "chosen": [user(ASKED), assistant(GOOD)], "rejected": [user(ASKED), assistant(BAD)]}
    },
    "no prompt": {"chosen": [user(ASKED), assistant(GOOD)], "rejected": [user(ASKED), assistant(BAD)]},
}


@pytest.mark.parametrize("name", PAIRS)
def test_the_prompt_of_a_pair_stands_before_both_answers(name: str, tokenizer: str) -> None:
    for side, answer in (("chosen_", GOOD), ("rejected_", BAD)):
        text = text_of(tokenizer, [user(ASKED), assistant(answer)])
        assert sample("MiniMindPairwiseHandler", PAIRS[name], tokenizer, side=side) == expected(tokenizer, text)


def test_a_prompt_of_several_messages_stands_before_both_answers(tokenizer: str) -> None:
    before = [system("简短。"), user("a"), assistant("b"), user("c")]
    record = {"prompt": before, "chosen": [assistant("d")], "rejected": [assistant("e")]}
    text = text_of(tokenizer, [*before, assistant("e")])
    assert sample("MiniMindPairwiseHandler", record, tokenizer, side="rejected_") == expected(tokenizer, text)


def test_answers_without_a_question_and_prompts_of_other_questions_are_rejected(tokenizer: str) -> None:
    record: dict[str, Any] = {"chosen": [assistant(GOOD)], "rejected": [assistant(BAD)]}
    assert "is not the user's but of role 'assistant'" in reason("MiniMindPairwiseHandler", record, tokenizer)
    record = {**PAIRS["no prompt"], "prompt": "another question"}
    assert "field 'prompt' is not what the messages begin with" in reason("MiniMindPairwiseHandler", record, tokenizer)
    ignored = ChatOptions(map_keys={"prompt": ""}, empty_think_ratio=1.0)
    text = text_of(tokenizer, [user(ASKED), assistant(GOOD)])
    found = sample("MiniMindPairwiseHandler", record, tokenizer, ignored, side="chosen_")
    assert found == expected(tokenizer, text)


def test_a_prompt_with_another_system_message_is_rejected(tokenizer: str) -> None:
    both = {side: [system("A"), user(ASKED), assistant(text)] for side, text in (("chosen", GOOD), ("rejected", BAD))}
    record = {"prompt": [system("B"), user(ASKED)], **both}
    assert "field 'prompt' has another system message" in reason("MiniMindPairwiseHandler", record, tokenizer)
    same = {**record, "prompt": [system("A"), user(ASKED)]}
    text = text_of(tokenizer, [system("A"), user(ASKED), assistant(GOOD)])
    assert sample("MiniMindPairwiseHandler", same, tokenizer, side="chosen_") == expected(tokenizer, text)


QUESTION = [system("请把答案写在方框里。"), user("1+1等于几？")]


@pytest.mark.parametrize("handler", ["MiniMindPromptHandler", "MiniMindAgentHandler", "MiniMindMathHandler"])
@pytest.mark.parametrize("messages", [QUESTION, QUESTION[1:], [user("a"), assistant("b"), *QUESTION[1:]]])
def test_a_question_at_the_end_stays_in_the_prompt(handler: str, messages: list[Turn], tokenizer: str) -> None:
    """Only an answer is a placeholder."""
    text = text_of(tokenizer, messages, add_generation_prompt=True, open_thinking=False)
    for ending in ([], [assistant("无")]):
        record = {"conversations": [*messages, *ending], "gt": ["2"]}
        found = encoded_by(handler, record, tokenizer).sequences["input_ids"][0].tolist()
        assert found == ids_of(tokenizer, text)


@pytest.mark.parametrize("prompt", [ASKED, [user(ASKED)]])
def test_tasks_of_trl_have_a_prompt_alone(prompt: Any, tokenizer: str, tmp_path: Path) -> None:
    text = text_of(tokenizer, [user(ASKED)], add_generation_prompt=True, open_thinking=False)
    found = encoded_by("MiniMindPromptHandler", {"prompt": prompt}, tokenizer).sequences["input_ids"][0].tolist()
    assert found == ids_of(tokenizer, text)
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"prompt": prompt}))
    assert read_prompts([], str(tmp_path / "prompts.jsonl"))[0].messages == [user(ASKED)]


# ------------------------------------------------------------------ tools and the system prompt

TALK = [user("潮位？"), assistant("", tool_calls=CALLS[:1]), tool("2m"), assistant("2m。")]
SHARED = [
    said("human", "潮位？"), said("function_call", json.dumps(CALLS[0])), said("observation", "2m"),
    said("gpt", "2m。"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("handler", "record"),
    [
        ("SharegptStyleInstructionHandler", {"conversations": SHARED}),
        ("MiniMindInstructionHandler", {"conversations": TALK}),
        ("OpenAIInstructionHandler", {"messages": TALK}),
    ],
)
@pytest.mark.parametrize("as_text", [False, True])
def test_tools_and_system_next_to_the_messages_are_written(
    handler: str, record: dict[str, Any], as_text: bool, tokenizer: str
) -> None:
    tools: Any = json.dumps(TOOLS, ensure_ascii=False) if as_text else TOOLS
    found = sample(handler, {**record, "tools": tools, "system": "你是港务员。"}, tokenizer)
    assert found == expected(tokenizer, text_of(tokenizer, [system("你是港务员。"), *TALK], TOOLS))


def test_prompt_files_read_what_preprocessing_reads(tokenizer: str, tmp_path: Path) -> None:
    """One record, asked and trained: the text of the prompt is the beginning of the sample."""
    talk = [{**TALK[0], "content": [{"type": "text", "text": "潮"}, {"type": "text", "text": "位？"}]}, *TALK[1:]]
    record = {"conversations": talk, "tools": TOOLS, "system": "你是港务员。"}
    (tmp_path / "p.jsonl").write_text(json.dumps(record))
    [prompt] = read_prompts([], str(tmp_path / "p.jsonl"))
    text = text_of(tokenizer, prompt.messages, prompt.tools, add_generation_prompt=True)
    ids, _ = sample("MiniMindInstructionHandler", record, tokenizer)
    assert "港务员" in text and "潮位？" in text and '"name": "tide", "description"' in text
    assert ids[: len(ids_of(tokenizer, text))] == ids_of(tokenizer, text)


@pytest.mark.parametrize("handler", ["AlpacaStyleInstructionHandler", "R1AlpacaStyleInstructionHandler"])
def test_alpaca_s_system_is_read_without_map_keys(handler: str, tokenizer: str) -> None:
    record = {"instruction": "a", "output": "b", "system": "Be brief."}
    found = encoded_by(handler, record, tokenizer).sequences["input_ids"][0].tolist()
    opened = text_of(tokenizer, [system("Be brief."), user("a")], add_generation_prompt=True, open_thinking=False)
    whole = text_of(tokenizer, [system("Be brief."), user("a"), assistant("b")])
    assert found == ids_of(tokenizer, opened if handler.startswith("R1") else whole)


def test_tools_that_differ_are_rejected(tokenizer: str) -> None:
    record = {"conversations": [system("", tools=[TIDE]), *TALK], "tools": [{**TIDE, "name": "wind"}]}
    assert "other tools than the field 'tools'" in reason("MiniMindInstructionHandler", record, tokenizer)


# ------------------------------------------------------------------ which answers are learned

TWICE = [user("报一个偶数"), assistant("七"), user("不对，再来"), assistant("八")]


def marked(key: str, *values: Any) -> list[Turn]:
    """The two answers with a key."""
    given = iter(values)
    return [{**turn, key: next(given)} if turn["role"] == "assistant" else turn for turn in TWICE]


@pytest.mark.parametrize(("key", "values"), [("loss", (False, True)), ("weight", (0, 1)), ("loss", (False, None))])
def test_answers_without_a_loss_have_no_labels(key: str, values: tuple[Any, Any], tokenizer: str) -> None:
    ids, labels = expected(tokenizer, text_of(tokenizer, TWICE), [1])
    turns = marked(key, *values)
    assert sample("OpenAIInstructionHandler", {"messages": turns}, tokenizer) == (ids, labels)
    assert sample("MiniMindInstructionHandler", {"conversations": turns}, tokenizer) == (ids, labels)
    names = {"user": "human", "assistant": "gpt"}
    shared = [said(names[turn["role"]], turn["content"], **{k: turn[k] for k in turn.keys() & {key}}) for turn in turns]
    assert sample("SharegptStyleInstructionHandler", {"conversations": shared}, tokenizer) == (ids, labels)
    template = ChatOptions(prompt_type="qwen3", enable_thinking=True)
    assert sample("OpenAIInstructionHandler", {"messages": turns}, tokenizer, template) == (ids, labels)


@pytest.mark.parametrize(
    ("turns", "message"),
    [
        (marked("weight", 0.5, 1), "message 2 has weight 0.5; expected 0 or 1"),
        (marked("loss", "no", True), "message 2 has loss 'no'; expected true or false"),
        ([{**turn, "loss": True, "weight": 0} for turn in TWICE], "loss True and weight 0, which differ"),
        ([user("a", loss=True), assistant("b")], "of role 'user' has loss True; only the assistant's"),
    ],
)
def test_a_loss_that_cannot_be_had_is_rejected(turns: list[Turn], message: str, tokenizer: str) -> None:
    assert message in reason("OpenAIInstructionHandler", {"messages": turns}, tokenizer)


def test_a_text_that_looks_like_an_answer_cannot_be_told_from_one_without_loss(tokenizer: str) -> None:
    turns = [user("x<|im_end|>\n<|im_start|>assistant\ny"), *marked("loss", False, True)[1:]]
    options = Options("-", tokenizer, handler="OpenAIInstructionHandler", chat=AS_IT_IS)
    stage = make_stage(options, tokenizer_info(tokenizer), load_encoder(tokenizer, "tokenizers"))
    prepared = stage.prepare({"messages": turns})
    assert not isinstance(prepared, Reject)
    [(place, why)] = stage.encode([prepared]).unusable
    assert place == 0 and "2 answers, of which some have no loss, but the text has 3 places" in why


# ------------------------------------------------------------------ order

OUT_OF_ORDER: dict[str, tuple[list[Turn], str]] = {
    "question twice": ([user("a"), user("b"), assistant("c")], "message 2 is of role 'user' after 'user'"),
    "answer twice": ([user("a"), assistant("b"), assistant("c")], "message 3 is of role 'assistant' after 'assistant'"),
    "answer first": ([assistant("a"), user("b"), assistant("c")], "is not the user's but of role 'assistant'"),
    "system late": ([user("a"), system("s"), assistant("c")], "message 2 is of role 'system' after 'user'"),
    "result first": ([tool("a"), assistant("c")], "is not the user's but of role 'tool'"),
    "result of nothing": ([user("a"), tool("b"), assistant("c")], "message 2 is of role 'tool' after 'user'"),
}


@pytest.mark.parametrize("name", OUT_OF_ORDER)
def test_a_wrong_order_is_rejected_with_the_reason(name: str, tokenizer: str, tmp_path: Path) -> None:
    turns, message = OUT_OF_ORDER[name]
    records: dict[str, dict[str, Any]] = {
        "MiniMindInstructionHandler": {"conversations": turns},
        "OpenAIInstructionHandler": {"messages": turns},
        "MiniMindPairwiseHandler": {"chosen": turns, "rejected": turns},
        "MiniMindPromptHandler": {"conversations": [*turns, user("q"), assistant("")]},
    }
    for handler, record in records.items():
        assert message in reason(handler, record, tokenizer), handler
    (tmp_path / "p.jsonl").write_text(json.dumps({"messages": [*turns, user("q")]}))
    with pytest.raises(UserError, match=re.escape(message)):
        read_prompts([], str(tmp_path / "p.jsonl"))


def test_sharegpt_names_the_turn_in_its_own_words(tokenizer: str) -> None:
    record = {"conversations": [said("human", "a"), said("human", "b"), said("gpt", "c")]}
    assert (
        reason("SharegptStyleInstructionHandler", record, tokenizer) == "turn 2 is from 'human'; expected 'gpt' there"
    )


PARALLEL: dict[str, tuple[str, dict[str, Any]]] = {
    "sharegpt": (
        "SharegptStyleInstructionHandler",
        {"conversations": [
            said("human", "潮位？"), said("function_call", json.dumps(CALLS[0])),
            said("function_call", json.dumps(CALLS[1])), said("observation", "2m"), said("observation", "3m"),
            said("gpt", "好。")]},
    ),
    "openai": (
        "OpenAIInstructionHandler",
        {"messages": [user("潮位？"), assistant("", tool_calls=CALLS[:1]), assistant("", tool_calls=CALLS[1:]),
                      tool("2m"), tool("3m"), assistant("好。")]},
    ),
    "minimind": (
        "MiniMindInstructionHandler",
        {"conversations": [user("潮位？"), *(assistant("", tool_calls=json.dumps([call])) for call in CALLS),
                           tool("2m"), tool("3m"), assistant("好。")]},
    ),
}  # fmt: skip
ONE_TURN = [user("潮位？"), assistant("", tool_calls=CALLS), tool("2m"), tool("3m"), assistant("好。")]


@pytest.mark.parametrize("name", PARALLEL)
@pytest.mark.parametrize("chat", [AS_IT_IS, replace(AS_IT_IS, prompt_type="qwen3", enable_thinking=True)])
def test_parallel_calls_in_turns_of_their_own_are_one_message(name: str, chat: ChatOptions, tokenizer: str) -> None:
    handler, record = PARALLEL[name]
    found = sample(handler, record, tokenizer, chat)
    assert found == expected(tokenizer, text_of(tokenizer, ONE_TURN))


def test_a_text_and_its_call_are_one_message(tokenizer: str) -> None:
    shared = [SHARED[0], said("gpt", "我查一下。"), *SHARED[1:]]
    text = text_of(tokenizer, [TALK[0], {**TALK[1], "content": "我查一下。"}, *TALK[2:]])
    assert sample("SharegptStyleInstructionHandler", {"conversations": shared}, tokenizer) == expected(tokenizer, text)


# ------------------------------------------------------------------ other names of the same


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_thoughts_are_read_under_their_common_names(key: str, tokenizer: str) -> None:
    text = text_of(tokenizer, [user("12*13=?"), assistant("156", reasoning_content="120+36")])
    answer = assistant("156", **{key: "120+36"})
    wanted = expected(tokenizer, text)
    assert sample("OpenAIInstructionHandler", {"messages": [user("12*13=?"), answer]}, tokenizer) == wanted
    assert sample("MiniMindInstructionHandler", {"conversations": [user("12*13=?"), answer]}, tokenizer) == wanted
    shared = [said("human", "12*13=?"), said("gpt", "156", **{key: "120+36"})]
    assert sample("SharegptStyleInstructionHandler", {"conversations": shared}, tokenizer) == wanted
    record = {"instruction": "12*13=?", "output": "156", key: "120+36"}
    assert sample("AlpacaStyleInstructionHandler", record, tokenizer) == wanted


def test_openai_s_parts_roles_and_calls(tokenizer: str) -> None:
    parts = [{"type": "text", "text": "潮"}, {"type": "input_text", "text": "位？"}]
    called = {"role": "assistant", "content": None, "function_call": {**CALLS[0], "arguments": '{"port": "A"}'}}
    result = {"role": "function", "name": "tide", "content": [{"type": "text", "text": "2m"}]}
    turns = [
        {"role": "developer", "content": "S"},
        {"role": "user", "content": parts},
        called,
        result,
        assistant("2m。"),
    ]
    found = sample("OpenAIInstructionHandler", {"messages": turns}, tokenizer)
    assert found == expected(tokenizer, text_of(tokenizer, [system("S"), *TALK]))
    turns = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}, assistant("a")]
    assert "part of type 'image_url'" in reason("OpenAIInstructionHandler", {"messages": turns}, tokenizer)


# ------------------------------------------------------------------ keys that nothing reads


def unused(capfd: pytest.CaptureFixture[str]) -> list[str]:
    """What each line about unused keys lists."""
    return [line.rpartition(": ")[2] for line in capfd.readouterr().err.splitlines() if "nothing reads" in line]


def test_wrong_orders_are_counted_and_unused_keys_reported_once(
    tokenizer: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    turns = [user("a", name="Ann"), assistant("b", refusal=None, score=0.5), user("c", name="Ann"), assistant("d")]
    rows = [{"messages": turns, "id": number, "quality": 1.0 if number else None, "note": ""} for number in range(3)]
    rows.append({"messages": [user("a"), user("b"), assistant("c")]})
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    options = Options(str(tmp_path / "a.jsonl"), tokenizer, str(tmp_path / "out"), handler="OpenAIInstructionHandler")
    convert(replace(options, max_reject_rate=0.5))
    [rejected] = map(json.loads, (tmp_path / "out.rejects.jsonl").read_text().splitlines())
    assert (rejected["line"], rejected["reason"][:46]) == (4, "message 2 is of role 'user' after 'user'; expe")
    assert unused(capfd) == ["id (3), messages[].name (6), messages[].score (3), quality (2)"]
    meta = json.loads((tmp_path / "out_packed_input_ids_document.meta.json").read_text())
    assert meta["unused"] == {"id": 3, "messages[].name": 6, "messages[].score": 3, "quality": 2}


@pytest.mark.parametrize(
    ("handler", "record", "found"),
    [
        (
            "MiniMindPairwiseHandler",
            {"prompt": [user(ASKED, name="Ann")], "chosen": [assistant(GOOD)], "rejected": [assistant(BAD, score=1)]},
            ["prompt[].name (1), rejected[].score (1)"],
        ),
        (
            "SharegptStylePairwiseHandler",
            {
                "conversations": [said("human", "a", id=1)],
                "chosen": said("gpt", "b"),
                "rejected": said("gpt", "c"),
            },
            ["conversations[].id (1)"],
        ),
    ],
)
def test_keys_of_what_both_sides_of_a_pair_share_count_once(
    handler: str, record: Any, found: list[str], tokenizer: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps(record))
    convert(Options(str(tmp_path / "a.jsonl"), tokenizer, str(tmp_path / "out"), handler=handler))
    assert unused(capfd) == found


def test_unused_columns_of_parquet_are_reported_without_being_read(
    tokenizer: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    table = pyarrow.table({"text": ["a", "b", "c"], "url": ["x", None, "y"], "meta": [{"k": 1}, {"k": 2}, {"k": 3}]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    convert(Options(str(tmp_path / "a.parquet"), tokenizer, str(tmp_path / "out")))
    assert unused(capfd) == ["meta (3), url (2)"]


def test_prompt_files_report_unused_keys(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "p.jsonl").write_text('{"prompt": "a", "level": 3}\n{"messages": [{"role": "user", "content": "b"}]}\n')
    read_prompts([], str(tmp_path / "p.jsonl"))
    assert unused(capfd) == ["level (1)"]


def test_what_a_chat_template_does_not_write_is_reported(
    tmp_path: Path, tokenizer: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """A template without tools, as older ones, loses them and the calls."""
    (tmp_path / "tokenizer.json").write_bytes((Path(tokenizer) / "tokenizer.json").read_bytes())
    config = json.loads((Path(tokenizer) / "tokenizer_config.json").read_text())
    config["chat_template"] = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    )
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    talk = {
        "messages": [*TALK[:3], assistant("2m。", reasoning_content="看表")],
        "tools": TOOLS,
        "history": [["q", "a"]],
    }
    (tmp_path / "a.jsonl").write_text(json.dumps(talk))
    source, handler = str(tmp_path / "a.jsonl"), "OpenAIInstructionHandler"
    convert(Options(source, str(tmp_path), str(tmp_path / "out"), handler=handler))
    ending = " (the chat template does not write it) (1)"
    assert unused(capfd) == [f"history (1), reasoning_content{ending}, tool_calls{ending}, tools{ending}"]


# ------------------------------------------------------------------ files


def rows_of(path: Path) -> list[Any]:
    shards = plan_shards(find_sources(str(path)), subsets=1)
    return [record for shard in shards for _, record in ShardReader(shard, None)]


def test_parquet_holds_the_keys_that_the_records_had(tokenizer: str, tmp_path: Path) -> None:
    """pyarrow gives every object the keys of all others, with null."""
    rows = []
    for name, argument, value in (("tide", "port", "A"), ("wind", "hour", 9)):
        kind = "string" if isinstance(value, str) else "integer"
        parameters = {"type": "object", "properties": {argument: {"type": kind}}, "required": [argument]}
        call = {"id": "1", "type": "function", "function": {"name": name, "arguments": {argument: value}}}
        turns = [user("?"), {"role": "assistant", "content": None, "tool_calls": [call]}, tool("2"), assistant("2。")]
        function = {"name": name, "description": "d", "parameters": parameters}
        rows.append({"messages": turns, "tools": [{"type": "function", "function": function}]})
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "calls.parquet")
    for row, original in zip(rows_of(tmp_path / "calls.parquet"), rows, strict=True):
        found = sample("OpenAIInstructionHandler", row, tokenizer)
        assert found == sample("OpenAIInstructionHandler", original, tokenizer)
        assert row["tools"] == original["tools"]


def test_names_in_capitals_are_read(tmp_path: Path) -> None:
    (tmp_path / "A.JSONL").write_text('{"text": "a"}\n')
    (tmp_path / "B.Json").write_text('[{"text": "b"}]')
    (tmp_path / "C.TXT").write_text("c\n")
    assert [row["text"] for row in rows_of(tmp_path)] == ["a", "b", "c"]
    assert [row["text"] for row in rows_of(tmp_path / "A.JSONL")] == ["a"]


@pytest.mark.parametrize("name", ["data.csv", "data.CSV", "data.tsv", "data.csv.gz"])
def test_csv_is_refused_by_name(name: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / name).write_text("text\na\n")
    for spec in (str(tmp_path / name), str(tmp_path), f"{tmp_path}/*"):
        with pytest.raises(UserError, match=rf"{re.escape(str(tmp_path / name))}: [CT]SV files are not read; expected"):
            find_sources(spec)


def test_ignored_files_of_a_directory_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a.jsonl", "README.md", "deep/model.safetensors", ".hidden", "out_text_document.meta.json", "x.bin"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text('{"text": "a"}\n')
    assert [Path(source.path).name for source in find_sources(str(tmp_path))] == ["a.jsonl"]
    [line] = capsys.readouterr().err.splitlines()
    assert line == f"input {tmp_path}: ignored 2 files of other kinds (README.md, model.safetensors)"
