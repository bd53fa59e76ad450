"""Labels are where MiniMind has them, for every format and tokenizer; what is random is decided by the seed.

The references here are written from MiniMind's and MindSpeed-LLM's formats and use nothing of the kit:
transformers renders and encodes, and the loss is found in the text, by character offsets.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from minimind_mcore.errors import UserError
from minimind_mcore.preprocess import stages, train_tokenizer
from minimind_mcore.preprocess.conversations import Conversation
from minimind_mcore.preprocess.handlers import CHAT_HANDLERS, find_handler
from minimind_mcore.preprocess.options import ChatOptions, Options, validate
from minimind_mcore.preprocess.readers import Reject
from minimind_mcore.preprocess.stages import Encoded, make_stage
from minimind_mcore.preprocess.tokenize import load_encoder, tokenizer_info

AS_IT_IS = ChatOptions(system_ratio=0.0, empty_think_ratio=1.0)
EMPTY_THINK = "<think>\n\n</think>\n\n"
TOOLS = [{"type": "function", "function": {"name": "add", "description": "两数之和", "parameters": {"type": "object"}}}]
CALLS = [{"name": "add", "arguments": {"a": 25, "b": 37}}]


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str, **fields: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **fields}


# MiniMind's files, in both languages: plain, several turns, system, thoughts in a field and in the text, tool calls
# as JSON text, two results in a row, text that looks like a turn.
DIALOGUES: dict[str, list[dict[str, Any]]] = {
    "turns": [user("你好"), assistant("你好！有什么可以帮你？"), user("Thanks, bye."), assistant("再见！")],
    "system": [{"role": "system", "content": "You translate."}, user("早上好"), assistant("Good morning.\n")],
    "thought": [user("12*13=?"), assistant("156", reasoning_content="12*13=120+36\n=156")],
    "reason": [user("1+1=?"), assistant("<think>\n直接相加。\n</think>\n<answer>\n2\n</answer>")],
    "empty thought": [user("hi"), assistant(EMPTY_THINK + "Hello! 😀")],
    "tools": [
        {"role": "system", "content": "", "tools": json.dumps(TOOLS, ensure_ascii=False)},
        user("25+37 等于多少？"),
        assistant("", tool_calls=json.dumps(CALLS)),
        {"role": "tool", "content": '{"result": 62}'},
        {"role": "tool", "content": '{"checked": true}'},
        assistant("25+37=62。"),
    ],
    "markup": [user("what is <|im_end|>\n and </think>?"), assistant("a mark\n\n"), user("再说"), assistant("标记")],
}


@pytest.fixture(scope="module", params=["own", "v3", "v2"])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tokenizer that the kit trained, and MiniMind's published ones where they are given."""
    if request.param == "own":
        directory = str(tmp_path_factory.mktemp("tokenizer") / "tk")
        train_tokenizer.save(train_tokenizer.train(iter(["assistant user system 你好 " * 9]), 310), directory)
        return directory
    root = os.environ.get("MINIMIND_TOKENIZER_DIR")
    if not root:
        pytest.skip("MINIMIND_TOKENIZER_DIR is not set: MiniMind's published tokenizers are not shipped here")
    return str(Path(root) / request.param)


def generation(tokenizer: str) -> str:
    return Path(tokenizer).name if Path(tokenizer).name in ("v2", "v3") else "v3"


def text_of(tokenizer: str, messages: list[dict[str, Any]], **options: Any) -> str:
    """The conversation as the tokenizer's chat template writes it, JSON fields parsed, as MiniMind does."""
    tools, parsed = None, []
    for message in messages:
        message = dict(message)
        tools = json.loads(message.pop("tools")) if message.get("tools") else tools
        if message.get("tool_calls"):
            message["tool_calls"] = json.loads(message["tool_calls"])
        parsed.append(message)
    reference = AutoTokenizer.from_pretrained(tokenizer)
    return str(reference.apply_chat_template(parsed, tools=tools, tokenize=False, **options))


def expected(tokenizer: str, text: str, length: int | None = None) -> tuple[list[int], list[int]]:
    """Ids and labels of a written conversation: loss from behind "assistant\\n" to behind "<|im_end|>\\n"."""
    encoded = AutoTokenizer.from_pretrained(tokenizer)(text, return_offsets_mapping=True)
    answers = [m.span(1) for m in re.finditer(r"<\|im_start\|>assistant\n(.*?<\|im_end\|>\n)", text, re.S)]
    labels = [
        token if any(start <= a and b <= stop for start, stop in answers) else -100
        for token, (a, b) in zip(encoded.input_ids, encoded.offset_mapping, strict=True)
    ]
    return encoded.input_ids[:length], labels[:length]


def encoded_by(handler: str, record: Any, tokenizer: str, length: int | None, chat: ChatOptions) -> Encoded:
    options = Options("-", tokenizer, handler=handler, seq_length=length, chat=chat)
    info = tokenizer_info(tokenizer)
    validate(options, info)
    stage = make_stage(options, info, load_encoder(tokenizer, "tokenizers"))
    prepared = stage.prepare(record)
    assert not isinstance(prepared, Reject), prepared.reason
    return stage.encode([prepared])


def sample(
    handler: str, record: Any, tokenizer: str, length: int | None = None, chat: ChatOptions = AS_IT_IS
) -> dict[str, list[int]]:
    """The sequences that a handler makes of a record."""
    return {
        key: ids.tolist() for key, (ids, _) in encoded_by(handler, record, tokenizer, length, chat).sequences.items()
    }


def pair_of(tokens: dict[str, list[int]], side: str = "") -> tuple[list[int], list[int]]:
    return tokens[f"{side}input_ids"], tokens[f"{side}labels"]


# ------------------------------------------------------------------ MiniMind's formats


@pytest.mark.parametrize("name", DIALOGUES)
@pytest.mark.parametrize("length", [None, 40, 16])
def test_loss_is_on_every_answer_and_its_end(name: str, length: int | None, tokenizer: str) -> None:
    messages = DIALOGUES[name]
    ids, labels = expected(tokenizer, text_of(tokenizer, messages), length)
    encoded = encoded_by("MiniMindInstructionHandler", {"conversations": messages}, tokenizer, length, AS_IT_IS)
    if all(label == -100 for label in labels):
        assert encoded.too_long == 1 and not encoded.unusable
        return
    found = {key: values.tolist() for key, (values, _) in encoded.sequences.items()}
    assert pair_of(found) == (ids, labels)
    assert found["attention_mask"] == [1] * len(ids)
    assert encoded.truncated == (len(expected(tokenizer, text_of(tokenizer, messages))[0]) > len(ids))


def test_the_forks_tools_are_called_functions(tokenizer: str) -> None:
    plain = DIALOGUES["tools"]
    forked = [{"role": "system", "content": "", "functions": TOOLS}, *plain[1:]]
    ours = [sample("MiniMindInstructionHandler", {"conversations": turns}, tokenizer) for turns in (plain, forked)]
    assert ours[0] == ours[1]


@pytest.mark.parametrize("length", [None, 32])
def test_pairs_have_the_loss_of_both_conversations(length: int | None, tokenizer: str) -> None:
    sides = {"chosen": DIALOGUES["turns"], "rejected": [user("你好"), assistant("No.")]}
    found = sample("MiniMindPairwiseHandler", sides, tokenizer, length)
    assert list(found) == ["chosen_input_ids", "chosen_labels", "rejected_input_ids", "rejected_labels"]
    for side, messages in sides.items():
        assert pair_of(found, f"{side}_") == expected(tokenizer, text_of(tokenizer, messages), length)


@pytest.mark.parametrize("thinking", [True, False])
@pytest.mark.parametrize("handler", ["MiniMindPromptHandler", "MiniMindAgentHandler"])
def test_tasks_end_where_the_model_begins(handler: str, thinking: bool, tokenizer: str) -> None:
    messages = DIALOGUES["tools"][:2] if "Agent" in handler else [{"role": "system", "content": "x"}, user("讲个笑话")]
    record = {"conversations": [*messages, assistant("无")], "gt": ["62"], "id": 7}
    encoded = encoded_by(handler, record, tokenizer, None, ChatOptions(thinking_ratio=float(thinking)))
    text = text_of(tokenizer, messages, add_generation_prompt=True, open_thinking=thinking)
    assert encoded.sequences["input_ids"][0].tolist() == AutoTokenizer.from_pretrained(tokenizer)(text).input_ids
    assert list(encoded.sequences) == ["input_ids", "attention_mask"]
    [line] = encoded.beside
    beside = json.loads(line)
    assert beside["prompt"] == text and beside["open_thinking"] is thinking
    assert (
        beside["gt"] == ["62"] and beside["id"] == 7 and [m["role"] for m in beside["messages"]] == ["system", "user"]
    )
    assert beside["tools"] == (TOOLS if "Agent" in handler else None)


def test_tasks_that_are_too_long_are_counted(tokenizer: str) -> None:
    encoded = encoded_by("MiniMindPromptHandler", {"conversations": DIALOGUES["turns"]}, tokenizer, 5, AS_IT_IS)
    assert encoded.too_long == 1 and not encoded.beside and not len(encoded.sequences["input_ids"][0])


# ------------------------------------------------------------------ MindSpeed-LLM's formats

HISTORY = [["你好", "你好！"], ["1+1=?", "2"]]
EQUAL: list[tuple[str, dict[str, Any], dict[str, Any] | None, list[dict[str, Any]]]] = [
    (
        "AlpacaStyleInstructionHandler", {"instruction": "Translate.", "input": "早上好", "output": "Good morning."},
        None, [user("Translate.\n早上好"), assistant("Good morning.")],
    ),
    (
        "AlpacaStyleInstructionHandler",
        {"q": "再见", "answer": "Bye", "history": HISTORY, "sys": "Be brief.", "input": "ignored"},
        {"prompt": "q", "query": "", "response": "answer", "history": "history", "system": "sys"},
        [{"role": "system", "content": "Be brief."}, *(turn for q, a in HISTORY for turn in (user(q), assistant(a))),
         user("再见"), assistant("Bye")],
    ),
    (
        "SharegptStyleInstructionHandler",
        {"conversations": [{"from": "system", "value": "S"}, {"from": "human", "value": "你好"},
                           {"from": "gpt", "value": "hi"}]},
        None, [{"role": "system", "content": "S"}, user("你好"), assistant("hi")],
    ),
    (
        "SharegptStyleInstructionHandler",
        {"chat": [{"role": "user", "content": "25+37?"}, {"role": "function_call", "content": json.dumps(CALLS[0])},
                  {"role": "observation", "content": "62"}, {"role": "assistant", "content": "62。"}],
         "tools": json.dumps(TOOLS, ensure_ascii=False)},
        {"messages": "chat", "tools": "tools", "tags": {"role_tag": "role", "content_tag": "content",
                                                       "user_tag": "user", "assistant_tag": "assistant"}},
        [user("25+37?"), assistant("", tool_calls=json.dumps(CALLS)), {"role": "tool", "content": "62"},
         assistant("62。")],
    ),
    (
        "OpenAIInstructionHandler",
        {"messages": [user("25+37?"), assistant("think", reasoning_content="25+37=62", tool_calls=[
            {"id": "1", "type": "function", "function": CALLS[0]}]), {"role": "tool", "tool_call_id": "1",
            "content": "62"}, assistant("62。")], "tools": TOOLS},
        None,
        [user("25+37?"), assistant("think", reasoning_content="25+37=62", tool_calls=json.dumps(CALLS)),
         {"role": "tool", "content": "62"}, assistant("62。")],
    ),
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(EQUAL)))
def test_other_formats_hold_the_same_conversation(number: int, tokenizer: str) -> None:
    handler, record, map_keys, messages = EQUAL[number]
    tools = TOOLS if "tools" in record else None
    parsed = [{**m, "tool_calls": json.loads(m["tool_calls"])} if "tool_calls" in m else m for m in messages]
    reference = AutoTokenizer.from_pretrained(tokenizer)
    text = reference.apply_chat_template(parsed, tools=tools, tokenize=False)
    assert pair_of(sample(handler, record, tokenizer, chat=ChatOptions(map_keys=map_keys))) == expected(tokenizer, text)


@pytest.mark.parametrize("handler", ["AlpacaStylePairwiseHandler", "SharegptStylePairwiseHandler"])
def test_their_pairs_have_loss_on_the_last_answer_only(handler: str, tokenizer: str) -> None:
    turns = [user("a"), assistant("b"), user("你好")]
    answers = {"chosen": "好！", "rejected": "no"}
    if "Alpaca" in handler:
        record: dict[str, Any] = {"instruction": "你好", "past": [["a", "b"]], **answers}
        chat = ChatOptions(map_keys={"history": "past"})
    else:
        names = {"user": "human", "assistant": "gpt"}
        conversation = [{"from": names[turn["role"]], "value": turn["content"]} for turn in turns]
        record = {side: {"from": "gpt", "value": text} for side, text in answers.items()}
        record["conversations"], chat = conversation, ChatOptions()
    found = sample(handler, record, tokenizer, chat=chat)
    for side, answer in answers.items():
        ids, labels = expected(tokenizer, text_of(tokenizer, [*turns, assistant(answer)]))
        first_end = next(i for i, label in enumerate(labels) if label != -100 and labels[i + 1] == -100) + 1
        assert pair_of(found, f"{side}_") == (ids, [-100] * first_end + labels[first_end:])


BELLE = "Human: 你好\nAssistant: 你好！\nHuman:What is 1+1? \nAssistant:"
FIXED: list[tuple[str, dict[str, Any], list[tuple[str, str]]]] = [
    (
        "GeneralInstructionHandler", {"instruction": "Translate.", "input": "早上好", "output": "Good morning."},
        [("Instruction", "Translate.\n早上好"), ("Response", "Good morning.")],
    ),
    (
        "GeneralInstructionHandler", {"instruction": "1+1=?", "input": "", "output": "2"},
        [("Instruction", "1+1=?\n"), ("Response", "2")],
    ),
    (
        "BelleMultiTurnInstructionHandler", {"instruction": BELLE, "output": " two\n"},
        [("Instruction", "你好"), ("Response", "你好！"), ("Instruction", "What is 1+1?"), ("Response", "two")],
    ),
    (
        "LeetcodePythonInstructionHandler",
        {"code_with_problem": " Two sum. \n```python\npass```", "code_only": "def f(): ...", "explanation_only": "So."},
        [("Instruction", "Two sum."), ("Response", "def f(): ...\nSo.")],
    ),
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(FIXED)))
def test_fixed_prompts_have_loss_on_the_last_answer(number: int, tokenizer: str) -> None:
    handler, record, turns = FIXED[number]
    text = (
        "\nBelow is an instruction that describes a task, paired with an input that provides further context. Write a "
        "response that appropriately completes the request. Please note that you need to think through your response "
        "logically and step by step.\n" + "".join(f"### {head}:\n{content}\n" for head, content in turns)
    )
    reference = AutoTokenizer.from_pretrained(tokenizer)
    ids = reference(text, add_special_tokens=False).input_ids
    start = len(reference(text[: text.rindex("Response:\n") + len("Response:\n")], add_special_tokens=False).input_ids)
    assert pair_of(sample(handler, record, tokenizer, chat=ChatOptions())) == (ids, [-100] * start + ids[start:])


def upstream_handler(home: Path, name: str, tokenizer: Any) -> Any:
    """MindSpeed-LLM's own class of that name, taken out of its file; only its base is ours."""
    classes = {}
    for file in ("templates.py", "data_handler.py"):
        source = (home / "mindspeed_llm/tasks/preprocess" / file).read_text(encoding="utf-8")
        classes |= {node.name: node for node in ast.parse(source).body if isinstance(node, ast.ClassDef)}

    class BaseDatasetHandler:
        def __init__(self, args: Any, *others: Any) -> None:
            self.args, self.tokenizer = args, None

        def _tokenize(self, prompt: str) -> dict[str, list[int]]:
            ids = tokenizer(prompt, add_special_tokens=False).input_ids
            return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": list(ids)}

    names: dict[str, Any] = {"BaseDatasetHandler": BaseDatasetHandler, "List": list, "dataclass": dataclass}
    for wanted in dict.fromkeys(["AlpacaTemplate", "Prompter", "GeneralInstructionHandler", name]):
        module = ast.Module([classes[wanted]], type_ignores=[])
        exec(compile(module, str(home), "exec"), names)
    args = argparse.Namespace(output_prefix="", append_eod=False, json_keys=[])
    return names[name](args, None, tokenizer, None)


@pytest.mark.parametrize("number", range(len(FIXED)))
def test_fixed_prompts_equal_mindspeed_llm_s_code(number: int, tokenizer: str) -> None:
    home = Path(os.environ.get("MINDSPEED_LLM_HOME", "/nowhere"))
    if not (home / "mindspeed_llm" / "tasks" / "preprocess" / "data_handler.py").is_file():
        pytest.skip("MINDSPEED_LLM_HOME is not a checkout of MindSpeed-LLM")
    handler, record, _ = FIXED[number]
    theirs = upstream_handler(home, handler, AutoTokenizer.from_pretrained(tokenizer))._filter(dict(record))
    found = pair_of(sample(handler, record, tokenizer, chat=ChatOptions()))
    assert found == (theirs["input_ids"][0], theirs["labels"][0])


def test_what_a_fixed_prompt_refuses(tokenizer: str) -> None:
    with pytest.raises(UserError, match="GeneralInstructionHandler has a fixed prompt; leave these flags out"):
        sample("GeneralInstructionHandler", FIXED[0][1], tokenizer, chat=ChatOptions(prompt_type="qwen3"))
    with pytest.raises(UserError, match="MOSSMultiTurnHandler: not in this kit: it writes ids 195 and 196"):
        find_handler("MOSSMultiTurnHandler")


# ------------------------------------------------------------------ templates of --prompt-type

ALPACA_RECORD = {"instruction": "1+1=?", "input": "", "output": "2", "history": HISTORY, "system": ""}
ALPACA_TURNS = [*(turn for q, a in HISTORY for turn in (user(q), assistant(a))), user("1+1=?"), assistant("2")]


@pytest.mark.parametrize("answer", ["2", "<think>\n相加\n</think>\n\n2", " two \n"])
def test_templates_equal_minimind_s_own(answer: str, tokenizer: str) -> None:
    """qwen3 is minimind-3's, chatml MiniMind2's, chatml_de minimind-3's less empty thoughts."""
    record = {**ALPACA_RECORD, "output": answer}
    chat = ChatOptions(map_keys={"history": "history"})
    text = text_of(tokenizer, [*ALPACA_TURNS[:-1], assistant(answer)])
    if generation(tokenizer) == "v2":
        names: dict[str, tuple[str, bool | None]] = {"chatml": (text, None)}
    else:
        names = {"qwen3": (text, True)}
        if "<think>" not in answer:
            names["chatml_de"] = (text.replace(EMPTY_THINK, ""), None)
    for name, (written, thinking) in names.items():
        options = replace(chat, prompt_type=name, enable_thinking=thinking)
        found = pair_of(sample("AlpacaStyleInstructionHandler", record, tokenizer, chat=options))
        assert found == expected(tokenizer, written)


def test_tools_are_written_by_qwen3_as_by_the_tokenizer(tokenizer: str) -> None:
    _, record, map_keys, messages = EQUAL[3]
    chat = ChatOptions(map_keys=map_keys, prompt_type="qwen3", enable_thinking=True)
    if generation(tokenizer) == "v2":
        pytest.skip("the second generation's template writes no thoughts")
    # MindSpeed-LLM leaves two line breaks before the tools also where there is no system text.
    text = AutoTokenizer.from_pretrained(tokenizer).apply_chat_template(
        [{"role": "system", "content": ""}, user("25+37?"), assistant("", tool_calls=CALLS), *messages[2:]],
        tools=TOOLS,
        tokenize=False,
    )
    found = sample("SharegptStyleInstructionHandler", record, tokenizer, chat=chat)
    assert pair_of(found) == expected(tokenizer, text)


@pytest.mark.parametrize(("thinking", "kept"), [(True, True), (None, True), (False, False)])
def test_thinking_decides_what_becomes_of_thoughts(thinking: bool | None, kept: bool, tokenizer: str) -> None:
    chat = ChatOptions(prompt_type="qwen3", enable_thinking=thinking)
    reference = AutoTokenizer.from_pretrained(tokenizer)
    for thought in ("<think>\nx\n</think>\n\n", ""):
        record = {"instruction": "q", "input": "", "output": f"{thought}2"}
        ids, labels = pair_of(sample("AlpacaStyleInstructionHandler", record, tokenizer, chat=chat))
        learnt = reference.decode([label for label in labels if label != -100])
        written = thought if thought and kept else EMPTY_THINK
        assert reference.decode(ids) == f"<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n{written}2<|im_end|>\n"
        assert learnt == f"{written if (thought and kept) or thinking else ''}2<|im_end|>\n"


def test_long_conversations_are_shortened_on_both_sides(tokenizer: str) -> None:
    """A template of LLaMA-Factory's class leaves one place free and shares the rest by the longer part."""
    reference = AutoTokenizer.from_pretrained(tokenizer)
    chat = ChatOptions(prompt_type="chatml_de")
    for question, answer, source in (("q " * 200, "a", None), ("q", "a " * 200, None), ("q " * 90, "a " * 90, 0.5)):
        record = {"instruction": question, "input": "", "output": answer}
        whole = pair_of(sample("AlpacaStyleInstructionHandler", record, tokenizer, chat=chat))
        ids, labels = pair_of(sample("AlpacaStyleInstructionHandler", record, tokenizer, 80, chat))
        asked = sum(label == -100 for label in whole[1])
        given = len(whole[0]) - asked
        target = given if 2 * given < 79 else 79 - asked if 2 * asked < 79 else int(79 * given / (asked + given))
        assert (len(ids), sum(label != -100 for label in labels)) == (79, target)
        assert ids == whole[0][: 79 - target] + whole[0][asked : asked + target], source
    assert reference.eos_token_id in whole[0]


def test_a_template_of_ones_own(tmp_path: Path, tokenizer: str) -> None:
    own = {
        "name": "mine",
        "format_user": {"slots": ["Q{{idx}}: {{content}}\nA:"]},
        "format_separator": {"slots": ["\n"]},
    }
    (tmp_path / "t.json").write_text(json.dumps([own]))
    chat = ChatOptions(map_keys={"history": "history"}, prompt_type="mine", prompt_type_path=str(tmp_path / "t.json"))
    ids, labels = pair_of(sample("AlpacaStyleInstructionHandler", ALPACA_RECORD, tokenizer, chat=chat))
    reference = AutoTokenizer.from_pretrained(tokenizer)
    assert reference.decode(ids) == "Q0: 你好\nA:你好！<|im_end|>\nQ1: 1+1=?\nA:2<|im_end|>\nQ2: 1+1=?\nA:2<|im_end|>"
    assert reference.decode([i for i in labels if i != -100]) == "你好！<|im_end|>2<|im_end|>2<|im_end|>"


# ------------------------------------------------------------------ what is random


def many(count: int) -> Iterator[Conversation]:
    for number in range(count):
        yield Conversation([user(f"question {number}"), assistant("answer")])


def test_draws_are_uniform_and_independent_of_each_other() -> None:
    draws = [stages.random_numbers(1, conversation) for conversation in many(4000)]
    for name in ("system", "prompt", "empty_think", "thinking"):
        values = [getattr(drawn, name) for drawn in draws]
        assert all(0 <= value < 1 for value in values)
        assert all(abs(sum(value < x for value in values) / 4000 - x) < 0.03 for x in (0.05, 0.2, 0.5, 0.9))
    both = sum(drawn.system < 0.2 and drawn.empty_think < 0.2 for drawn in draws)
    assert abs(both / 4000 - 0.04) < 0.015
    assert draws == [stages.random_numbers(1, conversation) for conversation in many(4000)]
    assert draws != [stages.random_numbers(2, conversation) for conversation in many(4000)]


def test_system_prompts_and_thoughts_come_and_go_as_often_as_in_minimind(tokenizer: str) -> None:
    options = Options("-", tokenizer, handler="MiniMindInstructionHandler")
    stage = make_stage(options, tokenizer_info(tokenizer), load_encoder(tokenizer, "tokenizers"))
    texts = []
    for number in range(600):
        prepared = stage.prepare({"conversations": [user(f"q{number}"), assistant(f"{EMPTY_THINK}a")]})
        assert not isinstance(prepared, Reject)
        texts.append(prepared.texts[0])
    given = [
        text for text in texts if text.startswith("<|im_start|>system") and "You are a helpful assistant<" not in text
    ]
    assert abs(len(given) / 600 - 0.2) < 0.05
    assert {text.split("\n")[1].removesuffix("<|im_end|>") for text in given} == set(stages.SYSTEM_PROMPTS)
    kept = sum(EMPTY_THINK in text for text in texts) / 600
    assert abs(kept - (0.05 if generation(tokenizer) == "v2" else 0.2)) < 0.05
    with_tools = stage.prepare({"conversations": DIALOGUES["tools"]})
    assert not isinstance(with_tools, Reject) and with_tools.texts[0].startswith("<|im_start|>system\n\n\n# Tools")


def test_other_formats_are_not_changed_at_random(tokenizer: str) -> None:
    options = Options("-", tokenizer, handler="AlpacaStyleInstructionHandler")
    resolved = options.chat.resolved(CHAT_HANDLERS[options.handler], tokenizer_info(tokenizer))
    assert (resolved.system_ratio, resolved.empty_think_ratio) == (0.0, 1.0)


# ------------------------------------------------------------------ what users get wrong

UNUSABLE: list[tuple[str, Any, str]] = [
    ("MiniMindInstructionHandler", {"text": "x"}, "field 'conversations' is missing"),
    ("MiniMindInstructionHandler", {"conversations": []}, "is empty"),
    ("MiniMindInstructionHandler", {"conversations": ["a"]}, "a list of other things than messages"),
    (
        "MiniMindInstructionHandler",
        {"conversations": [{"role": "bot", "content": "a"}]},
        "message 1 has the role 'bot'",
    ),
    ("MiniMindInstructionHandler", {"conversations": [user("a"), assistant("b", tool_calls="{")]}, "not valid JSON"),
    (
        "MiniMindInstructionHandler",
        {"conversations": [{"role": "user", "content": 3}]},
        "not|no string under 'content'",
    ),
    ("MiniMindInstructionHandler", {"conversations": [user("x\ud800"), assistant("y")]}, "lone surrogate"),
    ("MiniMindPairwiseHandler", {"chosen": [user("a")], "rejected": "b"}, "field 'rejected' is not a list of messages"),
    ("MiniMindPromptHandler", {"conversations": [assistant("a")]}, "no message before the assistant's"),
    ("MiniMindAgentHandler", {"conversations": [user("a"), assistant("")]}, "field 'gt' is not a list of answers"),
    ("AlpacaStyleInstructionHandler", {"instruction": "a", "output": ["b"]}, "'output' is not a string but an array"),
    ("SharegptStyleInstructionHandler", {"conversations": [{"from": "gpt", "value": "a"}]}, "turn 1 is from 'gpt'"),
    ("SharegptStyleInstructionHandler", {"conversations": [{"from": "human", "value": "a"}]}, "1 turns"),
    ("OpenAIInstructionHandler", {"messages": [assistant("a"), user("b")]}, "is not the user's"),
    ("OpenAIInstructionHandler", {"messages": [user("b")]}, "is not the assistant's"),
    ("AlpacaStyleInstructionHandler", 7, "not an object but a number"),
]


@pytest.mark.parametrize(("handler", "record", "reason"), UNUSABLE)
def test_a_record_that_cannot_be_used_says_why(handler: str, record: Any, reason: str, tokenizer: str) -> None:
    options = Options("-", tokenizer, handler=handler)
    rejected = make_stage(options, tokenizer_info(tokenizer), load_encoder(tokenizer, "tokenizers")).prepare(record)
    assert isinstance(rejected, Reject) and re.search(reason, rejected.reason), rejected


def test_a_conversation_without_an_answer_is_no_sample(tokenizer: str) -> None:
    encoded = encoded_by("MiniMindInstructionHandler", {"conversations": [user("a")]}, tokenizer, None, AS_IT_IS)
    assert encoded.unusable == [(0, "it has no answer of the assistant to learn")]


WRONG: list[tuple[str, ChatOptions, dict[str, Any], str]] = [
    ("AlpacaStyleInstructionHandlr", ChatOptions(), {}, "unknown; this version knows .*AlpacaStyleInstructionHandler"),
    (
        "AlpacaStyleInstructionHandler",
        ChatOptions(map_keys={"promt": "q"}),
        {},
        "not a column.* has prompt, query, resp",
    ),
    ("SharegptStyleInstructionHandler", ChatOptions(map_keys={"tags": {"a": "b"}}), {}, "in tags: role_tag"),
    ("OpenAIInstructionHandler", ChatOptions(map_keys={"tags": {}}), {}, "'tags' is not a column"),
    ("SharegptStyleInstructionHandler", ChatOptions(map_keys={"tags": "from"}), {}, "expected an object"),
    ("AlpacaStyleInstructionHandler", ChatOptions(prompt_type="llama3"), {}, "which has qwen3, chatml, chatml_de"),
    ("AlpacaStyleInstructionHandler", ChatOptions(enable_thinking=True), {}, "--prompt-type qwen3"),
    ("MiniMindInstructionHandler", ChatOptions(additional_keys=("labels",)), {}, "no tasks"),
    ("MiniMindPromptHandler", ChatOptions(additional_keys=("labels",)), {}, "no answer"),
    ("MiniMindInstructionHandler", ChatOptions(pack="pack"), {}, "--pack needs --seq-length"),
    ("MiniMindPairwiseHandler", ChatOptions(pack="pack"), {"seq_length": 9}, "instruction data only"),
    ("MiniMindInstructionHandler", ChatOptions(system_ratio=2.0), {}, "--system-ratio: found 2.0, expected 0 to 1"),
    ("MiniMindInstructionHandler", ChatOptions(), {"append_eod": True}, "--append-eod"),
    ("MiniMindInstructionHandler", ChatOptions(), {"dtype": "uint16"}, "for pretraining data"),
    ("GeneralPretrainHandler", ChatOptions(prompt_type="qwen3"), {}, "are for conversations"),
]


@pytest.mark.parametrize(("handler", "chat", "options", "message"), WRONG)
def test_wrong_options_are_refused(
    handler: str, chat: ChatOptions, options: dict[str, Any], message: str, tokenizer: str
) -> None:
    with pytest.raises(UserError, match=message):
        validate(Options("-", tokenizer, handler=handler, chat=chat, **options), tokenizer_info(tokenizer))


def test_a_tokenizer_without_a_chat_template_is_refused(tokenizer: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes((Path(tokenizer) / "tokenizer.json").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}')
    options = Options("-", str(tmp_path), handler="MiniMindInstructionHandler")
    with pytest.raises(UserError, match="no chat template"):
        validate(options, tokenizer_info(tmp_path))


def test_what_a_template_refuses_is_rejected_with_its_words(tokenizer: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes((Path(tokenizer) / "tokenizer.json").read_bytes())
    config = json.loads((Path(tokenizer) / "tokenizer_config.json").read_text())
    config["chat_template"] = "{{ raise_exception('roles must alternate') }}"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    options = Options("-", str(tmp_path), handler="MiniMindInstructionHandler")
    stage = make_stage(options, tokenizer_info(tmp_path), load_encoder(tmp_path, "tokenizers"))
    rejected = stage.prepare({"conversations": DIALOGUES["turns"]})
    assert isinstance(rejected, Reject) and "refuses it: roles must alternate" in rejected.reason
