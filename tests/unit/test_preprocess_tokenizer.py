"""Tokenizers: training, the chat template, backends that agree, and what a fingerprint sees."""

from __future__ import annotations

import itertools
import json
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from minimind_mcore.errors import UserError
from minimind_mcore.preprocess import train_tokenizer
from minimind_mcore.preprocess.tokenize import load_encoder, tokenizer_fingerprint, tokenizer_info

transformers = pytest.importorskip("transformers")

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": '查天气 <now> & "later"',
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    },
    {"name": "clock", "parameters": {}},
]


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "small.jsonl"
    words = ["train", "token", "你好", "世界", "model", "学习", "data", "12", "+", "="]
    generator = random.Random(0)
    lines = (json.dumps({"text": " ".join(generator.choices(words, k=30))}) for _ in range(300))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def tokenizer(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tokenizer") / "tk"
    train_tokenizer.main(["--input", str(corpus), "--output", str(directory), "--vocab-size", "330"])
    return directory


def test_training_twice_gives_the_same_files(corpus: Path, tokenizer: Path, tmp_path: Path) -> None:
    train_tokenizer.main(["--input", str(corpus), "--output", str(tmp_path / "again"), "--vocab-size", "330"])
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tokenizer / name).read_bytes()


def test_special_tokens_have_their_ids_and_are_never_split(tokenizer: Path) -> None:
    loaded = transformers.AutoTokenizer.from_pretrained(tokenizer)
    every = train_tokenizer.SPECIAL + train_tokenizer.MARKERS
    assert len(every) == 36
    assert [loaded.convert_tokens_to_ids(token) for token in every] == list(range(36))
    assert [loaded("a" + token).input_ids[-1] for token in every] == list(range(36))
    assert (loaded.pad_token_id, loaded.bos_token_id, loaded.eos_token_id, len(loaded)) == (0, 1, 2, 330)


def test_markers_stay_in_decoded_text_and_specials_do_not(tokenizer: Path) -> None:
    loaded = transformers.AutoTokenizer.from_pretrained(tokenizer)
    ids = loaded("<think>x</think><tool_call><|im_end|><|image_pad|>").input_ids
    assert loaded.decode(ids, skip_special_tokens=True) == "<think>x</think><tool_call>"


def test_any_text_survives_encoding_and_decoding(tokenizer: Path) -> None:
    loaded = transformers.AutoTokenizer.from_pretrained(tokenizer)
    for text in adversarial_texts(200):
        assert loaded.decode(loaded(text).input_ids) == text


def test_same_vocabulary_layout_as_the_published_one(tokenizer: Path, published_tokenizer: Path) -> None:
    if published_tokenizer.name != "v3":
        pytest.skip("only the third generation has these special tokens")
    ours, theirs = (json.loads((path / "tokenizer.json").read_text()) for path in (tokenizer, published_tokenizer))
    assert ours["added_tokens"] == theirs["added_tokens"]
    for name in ("normalizer", "pre_tokenizer", "decoder", "post_processor", "truncation", "padding"):
        assert ours[name] == theirs[name], name
    vocabularies = [
        sorted(content["model"].pop("vocab").items(), key=lambda item: item[1]) for content in (ours, theirs)
    ]
    assert [token for token, id in vocabularies[0] if id < 36 + 256] == [
        t for t, id in vocabularies[1] if id < 36 + 256
    ]
    for content in (ours, theirs):
        content["model"].pop("merges")
    assert ours["model"] == theirs["model"]


def test_digits_can_be_tokens_of_their_own(tmp_path: Path) -> None:
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps({"text": f"{n}+{n}={2 * n}"}) + "\n" for n in range(200)))
    words = ["--input", str(tmp_path / "sums.jsonl"), "--vocab-size", "340"]
    train_tokenizer.main([*words, "--output", str(tmp_path / "joined")])
    with pytest.raises(UserError, match="give more text"):  # there is nothing to join
        train_tokenizer.main([*words, "--output", str(tmp_path / "apart"), "--split-digits"])
    train_tokenizer.main([*words[:2], "--vocab-size", "292", "--output", str(tmp_path / "apart"), "--split-digits"])
    joined, apart = (transformers.AutoTokenizer.from_pretrained(tmp_path / name) for name in ("joined", "apart"))
    assert len(joined("150+150").input_ids) < len(apart("150+150").input_ids) == 7
    assert apart.decode(apart("150+150").input_ids) == "150+150"


def test_too_little_text_for_the_vocabulary_is_an_error(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="give more text"):
        train_tokenizer.main(["--input", str(corpus), "--output", str(tmp_path / "t"), "--vocab-size", "6400"])
    with pytest.raises(UserError, match="need 292"):
        train_tokenizer.main(["--input", str(corpus), "--output", str(tmp_path / "t"), "--vocab-size", "290"])
    assert not (tmp_path / "t").exists()


def test_a_directory_that_is_no_tokenizer_is_not_replaced(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="no tokenizer directory"):
        train_tokenizer.main(["--input", str(corpus), "--output", str(tmp_path), "--vocab-size", "300"])
    assert (tmp_path / "thesis.tex").exists()


def conversations() -> list[list[dict[str, Any]]]:
    """Every kind of turn, alone and in combination."""
    systems: list[list[dict[str, Any]]] = [
        [],
        [{"role": "system", "content": "你是一个助手。"}],
        [{"role": "system", "content": ""}],
    ]
    call = {"name": "weather", "arguments": {"city": "杭州", "days": [1, 2.5, None, True]}}
    wrapped = {"type": "function", "id": "1", "function": {"name": "clock", "arguments": '{"zone": "UTC"}'}}
    answers: list[dict[str, Any]] = [
        {"content": "你好！"},
        {"content": "\n\nleading and trailing \n\n"},
        {"content": ""},
        {"content": None},
        {"content": "156", "reasoning_content": "12*13\n=120+36"},
        {"content": "\nx", "reasoning_content": "\n\nthought\n\n"},
        {"content": "x", "reasoning_content": ""},
        {"content": "<think>\nfirst\n</think>\n\nthen this"},
        {"content": "no opening tag</think>\nrest"},
        {"content": "<think>a</think>b<think>c</think>\n\nd"},
        {"content": "<think>never closed"},
        {"content": "", "tool_calls": [call]},
        {"content": "\n", "tool_calls": [call]},
        {"content": "Let me see.", "tool_calls": [call, wrapped]},
        {"content": "", "tool_calls": [wrapped, call], "reasoning_content": "two calls"},
        {"content": "<think>\nhm\n</think>\n\n", "tool_calls": [wrapped]},
        {"content": "plain", "tool_calls": []},
        {"content": "plain", "tool_calls": None},
    ]
    tails: list[list[dict[str, Any]]] = [
        [],
        [{"role": "tool", "content": '{"t": "28°C"}'}],
        [
            {"role": "tool", "content": "one"},
            {"role": "tool", "content": "two"},
            {"role": "assistant", "content": "ok"},
        ],
        [
            {"role": "user", "content": "再见"},
            {"role": "system", "content": "be brief"},
            {"role": "user", "content": ""},
        ],
        [{"role": "user", "content": "<tool_response>\nby hand\n</tool_response>"}],
    ]
    found = []
    for system, answer, tail in itertools.product(systems, answers, tails):
        found.append([*system, {"role": "user", "content": "问题 <a> & 'b'"}, {"role": "assistant", **answer}, *tail])
    found += [[*system, *tail] for system, tail in itertools.product(systems, tails[1:])]
    return found


def test_chat_template_renders_as_the_published_one(tokenizer: Path, published_tokenizer: Path) -> None:
    if published_tokenizer.name != "v3":
        pytest.skip("the second generation has another template")
    ours, theirs = (transformers.AutoTokenizer.from_pretrained(path) for path in (tokenizer, published_tokenizer))
    settings = itertools.product((None, TOOLS), ({}, {"open_thinking": True}, {"open_thinking": False}), (True, False))
    for (tools, thinking, prompt), messages in itertools.product(list(settings), conversations()):
        options = {"tools": tools, "add_generation_prompt": prompt, "tokenize": False, **thinking}
        assert ours.apply_chat_template(messages, **options) == theirs.apply_chat_template(messages, **options)


def test_chat_template_says_what_a_turn_looks_like(tokenizer: Path) -> None:
    loaded = transformers.AutoTokenizer.from_pretrained(tokenizer)
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo", "reasoning_content": "hm"}]
    text = loaded.apply_chat_template(messages, tokenize=False)
    assert text == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n<think>\nhm\n</think>\n\nyo<|im_end|>\n"
    prompt = loaded.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True, open_thinking=True)
    assert prompt == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n<think>\n"


def adversarial_texts(count: int) -> list[str]:
    """Strings made to part implementations: specials and their pieces, scripts, white space, random code points."""
    generator = random.Random(7)
    pieces = [
        *train_tokenizer.SPECIAL[:4],
        *train_tokenizer.MARKERS[:6],
        *("<|", "|>", "<|im_end", "im_end|>", "<", "think", ">", "</", "'s", "'LL", "I'm", "don't", "''", "..."),
        *(
            " ",
            "  ",
            "\t",
            "\n",
            "\r\n",
            "\n\n\n",
            "\u00a0",
            "\u3000",
            "\u200b",
            "\u2028",
            "\u0085",
            "\x00",
            "\x7f",
            "\ufeff",
        ),
        *(
            "hello",
            "Hello",
            "WORLD",
            "你好",
            "世界",
            "，",
            "。",
            "日本語",
            "한국어",
            "العربية",
            "हिन्दी",
            "ไทย",
            "é",
            "e\u0301",
        ),
        *(
            "😀",
            "👩‍🚀",
            "🇨🇳",
            "𝔘",
            "\U0010ffff",
            "123",
            "4567890",
            "１２３",
            "Ⅷ",
            "²",
            "½",
            "_",
            "==",
            "def f():\n    ",
        ),
    ]
    texts = ["", *pieces]
    for _ in range(count):
        texts.append("".join(generator.choices(pieces, k=generator.randint(1, 40))))
        points = [generator.randrange(0x110000 if generator.random() < 0.3 else 0x3000) for _ in range(30)]
        texts.append("".join(chr(p) for p in points if not 0xD800 <= p < 0xE000))
    texts += [piece * 3000 for piece in ("a", " ", "\n", "你", "😀", "<|im_end|>")]
    return texts


@pytest.mark.parametrize("backend", ["tokenizers", "gigatoken"])
def test_backend_gives_the_tokens_of_transformers(backend: str, published_tokenizer: Path) -> None:
    if backend == "gigatoken":
        pytest.importorskip("gigatoken")
    compare_with_transformers(backend, published_tokenizer)


@pytest.mark.parametrize("backend", ["tokenizers", "gigatoken"])
def test_backend_gives_the_tokens_of_transformers_for_our_tokenizer(backend: str, tokenizer: Path) -> None:
    if backend == "gigatoken":
        pytest.importorskip("gigatoken")
    compare_with_transformers(backend, tokenizer)


def compare_with_transformers(backend: str, path: Path) -> None:
    texts = adversarial_texts(600)
    tokens, lengths = load_encoder(path, backend).encode(texts)
    reference = transformers.AutoTokenizer.from_pretrained(path)
    expected = [reference(text).input_ids for text in texts]
    assert lengths.tolist() == [len(ids) for ids in expected]
    assert tokens.tolist() == [id for ids in expected for id in ids]


def test_an_empty_batch_encodes_to_nothing(tokenizer: Path) -> None:
    for backend in ("tokenizers", "auto"):
        tokens, lengths = load_encoder(tokenizer, backend).encode([])
        assert len(tokens) == len(lengths) == 0


def test_an_encoder_inserts_nothing_and_info_says_what_the_tokenizer_inserts(tokenizer: Path, tmp_path: Path) -> None:
    shutil.copytree(tokenizer, tmp_path / "tk")
    file = tmp_path / "tk" / "tokenizer.json"
    content = json.loads(file.read_text())
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<|im_start|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<|im_start|>": {"id": "<|im_start|>", "ids": [1], "tokens": ["<|im_start|>"]}},
    }
    file.write_text(json.dumps(content))
    for backend in ("tokenizers", "auto"):
        found = load_encoder(tmp_path / "tk", backend).encode(["hi", ""])
        expected = load_encoder(tokenizer, "tokenizers").encode(["hi", ""])
        assert [part.tolist() for part in found] == [part.tolist() for part in expected]
    assert tokenizer_info(tmp_path / "tk").added == ([1], []) and not any(tokenizer_info(tokenizer).added)
    assert tokenizer_fingerprint(tmp_path / "tk") != tokenizer_fingerprint(tokenizer)


def test_fingerprint_survives_what_does_not_change_ids(tokenizer: Path, tmp_path: Path) -> None:
    transformers.AutoTokenizer.from_pretrained(tokenizer).save_pretrained(tmp_path / "resaved")
    content = json.loads((tokenizer / "tokenizer.json").read_text())
    content["model"]["merges"] = [" ".join(merge) for merge in content["model"]["merges"]]
    content["model"].pop("ignore_merges")
    content["decoder"] = None
    content["truncation"] = {"max_length": 3, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}
    (tmp_path / "tokenizer.json").write_text(json.dumps(dict(reversed(content.items())), indent=3))
    expected = tokenizer_fingerprint(tokenizer)
    assert tokenizer_fingerprint(tmp_path / "resaved") == expected
    assert tokenizer_fingerprint(tmp_path / "tokenizer.json") == expected
    # and truncation in the file does not cut documents
    first, second = (load_encoder(p).encode(["one two three four"])[0] for p in (tokenizer, tmp_path))
    assert np.array_equal(first, second)


@pytest.mark.parametrize("part", ["vocab", "merges", "added_tokens", "pre_tokenizer", "normalizer"])
def test_fingerprint_sees_what_changes_ids(part: str, tokenizer: Path, tmp_path: Path) -> None:
    content = json.loads((tokenizer / "tokenizer.json").read_text())
    if part == "vocab":
        vocab = content["model"]["vocab"]
        vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    elif part == "merges":
        content["model"]["merges"].pop()
    elif part == "added_tokens":
        content["added_tokens"][30]["lstrip"] = True
    elif part == "pre_tokenizer":
        content["pre_tokenizer"]["add_prefix_space"] = True
    else:
        content["normalizer"] = {"type": "NFC"}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    assert tokenizer_fingerprint(tmp_path) != tokenizer_fingerprint(tokenizer)


def test_info_reads_the_special_ids(tokenizer: Path) -> None:
    info = tokenizer_info(tokenizer)
    assert (info.vocab_size, info.bos_id, info.eos_id) == (330, 1, 2)


def test_a_path_without_a_tokenizer_is_named(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(UserError, match=r"no tokenizer\.json"):
            tokenizer_info(path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="damaged"):
        tokenizer_fingerprint(tmp_path)
