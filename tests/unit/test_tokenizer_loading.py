"""One tokenizer.json gives the same ids in conversion, generation, perplexity, and exports read by transformers.

The reference is the tokenizers library on tokenizer.json itself; for exports AutoTokenizer of transformers 5 and of
transformers 4 (TRANSFORMERS_4_DIR).
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
from helpers.weights_on_disk import SMALL, state_dict, write_hf
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

from minimind_mcore.checkpoint.opening import open_source
from minimind_mcore.converters.convert import convert as convert_weights
from minimind_mcore.converters.hf import HFTarget
from minimind_mcore.errors import UserError
from minimind_mcore.inference import evaluation
from minimind_mcore.inference.loading import Loaded, load_tokenizer
from minimind_mcore.inference.prompts import PromptEncoder, from_text
from minimind_mcore.preprocess import train_tokenizer
from minimind_mcore.preprocess.convert import convert
from minimind_mcore.preprocess.indexed import bin_path, read_index
from minimind_mcore.preprocess.options import Options, validate
from minimind_mcore.preprocess.stages import make_stage
from minimind_mcore.preprocess.tokenize import load_encoder, tokenizer_info

TEXTS = [
    "17+25=? 海边的风很大。 e\u0301 １２ don't",
    "<|im_start|>user\nhi<|im_end|>\n<think>\n</think> <new> end",
    "  two  spaces\n\n\nand lines ",
]
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
Change = dict[str, Any]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer with tokens of several digits, which Qwen2Tokenizer would split."""
    directory = tmp_path_factory.mktemp("tokenizer") / "tk"
    texts = ["17 25 1725 assistant user system 海边的风很大。 don't hello " * 9]
    train_tokenizer.save(train_tokenizer.train(iter(texts), 330), str(directory))
    return directory


def variant(source: Path, folder: Path, change: Change, **files: Change) -> Path:
    """A copy of a tokenizer: `change` in its tokenizer_config.json (None removes a key), and further JSON files."""
    folder.mkdir()
    shutil.copy(source / "tokenizer.json", folder)
    config = json.loads((source / "tokenizer_config.json").read_text()) | change
    config = {key: value for key, value in config.items() if value is not None}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def adds_bos(folder: Path) -> Path:
    """The tokenizer with a post-processor that begins every text with bos."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.post_processor = TemplateProcessing(single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)])
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def raw_ids(folder: Path, text: str) -> list[int]:
    ids: list[int] = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text, add_special_tokens=False).ids
    return ids


NEW = {"content": "<new>", "lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
# name: changes of tokenizer_config.json, config.json
FOREIGN: dict[str, tuple[Change, dict[str, Change]]] = {
    "as trained": ({}, {}),
    "Qwen2TokenizerFast": ({"tokenizer_class": "Qwen2TokenizerFast"}, {}),
    "LlamaTokenizer": ({"tokenizer_class": "LlamaTokenizer", "add_bos_token": True}, {}),
    "class of transformers 5": ({"tokenizer_class": "TokenizersBackend", "backend": "tokenizers"}, {}),
    "no class, qwen3": ({"tokenizer_class": None}, {"config": {"model_type": "qwen3"}}),
    "a token that tokenizer.json lacks": ({"additional_special_tokens": ["<new>", "<|im_end|>"]}, {}),
    "a list of extra tokens": ({"additional_special_tokens": None, "extra_special_tokens": ["<|im_end|>"]}, {}),
    "an image token": ({"image_token": "<new>"}, {}),
    "an added token": ({"added_tokens_decoder": {"400": NEW}}, {}),
    "other flags": ({"added_tokens_decoder": {"2": NEW | {"content": "<|im_end|>", "lstrip": True}}}, {}),
    "a space before": ({"add_prefix_space": True}, {}),
    "specials are split": ({"split_special_tokens": True}, {}),
    "a map of special tokens": (
        {"added_tokens_decoder": None, "bos_token": None, "eos_token": None},
        {"special_tokens_map": {"bos_token": "<|im_start|>", "eos_token": {"content": "<|im_end|>", "lstrip": False}}},
    ),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_generation_has_the_ids_of_training(name: str, trained: Path, tmp_path: Path) -> None:
    change, files = FOREIGN[name]
    folder = variant(trained, tmp_path / "tk", change, **files)
    info = tokenizer_info(folder)
    tokenizer = load_tokenizer(info)
    for text in TEXTS:
        expected = raw_ids(trained, text)
        assert load_encoder(folder).encode([text])[0].tolist() == expected
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == expected
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (info.bos_id, info.eos_id) == (1, 2)
    assert tokenizer.decode([1, *raw_ids(trained, "17+25"), 2], skip_special_tokens=True) == "17+25"


@pytest.mark.parametrize("kind", ["Qwen2TokenizerFast", None])
def test_a_published_tokenizer_is_read_alike(kind: str | None, published_tokenizer: Path, tmp_path: Path) -> None:
    files = {} if kind else {"config": {"model_type": "qwen3"}}
    folder = variant(published_tokenizer, tmp_path / "tk", {"tokenizer_class": kind}, **files)
    tokenizer = load_tokenizer(tokenizer_info(folder))
    reference = transformers.AutoTokenizer.from_pretrained(published_tokenizer)
    messages = [{"role": "user", "content": "17+25=?"}]
    for text in TEXTS:
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == raw_ids(published_tokenizer, text)
        ids = raw_ids(published_tokenizer, text)
        assert tokenizer.decode(ids) == reference.decode(ids)
    assert tokenizer.apply_chat_template(messages, tokenize=False) == reference.apply_chat_template(
        messages, tokenize=False
    )


# ------------------------------------------------------------------ exports

LOAD = """
import json, sys
from transformers import AutoTokenizer
folders, texts = json.load(sys.stdin)
found = {}
for folder in folders:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    names = [tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token]
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    found[folder] = [ids, names, chat, tokenizer("a")["input_ids"]]
print(json.dumps(found))
"""


def loaded_by(version: str, folders: list[str]) -> dict[str, Any]:
    """What AutoTokenizer of a version of transformers gives in a process of its own."""
    path = os.environ.get("TRANSFORMERS_4_DIR") if version == "4" else None
    if version == "4" and not path:
        pytest.skip("TRANSFORMERS_4_DIR is not set: transformers 4 is not installed beside the pinned version")
    environment = os.environ | ({"PYTHONPATH": path} if path else {})
    given = json.dumps([folders, TEXTS])
    done = subprocess.run(
        [sys.executable, "-c", LOAD], input=given, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def exported(model: str, tokenizer: Path, output: Path) -> Path:
    """An export in Hugging Face's format of a small model with this tokenizer."""
    config = SMALL[model].replace(vocab_size=330)
    source = write_hf(output.with_name(f"{output.name}-source"), config, state_dict(config, "hf"))
    return convert_weights(
        open_source(source), HFTarget(open_source(source), native=False, folder=tokenizer), output
    ).path


@pytest.fixture(scope="module")
def exports(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Exports with each of `FOREIGN`: its name by directory."""
    folder, found = tmp_path_factory.mktemp("exports"), {}
    for number, (name, (change, files)) in enumerate(FOREIGN.items()):
        foreign = variant(trained, folder / f"tk{number}", change, **files)
        found[str(exported(list(SMALL)[number % len(SMALL)], foreign, folder / f"out{number}"))] = name
    return found


@pytest.mark.parametrize("version", ["5", "4"])
def test_exports_have_the_ids_of_training_in_plain_transformers(
    version: str, trained: Path, exports: dict[str, str]
) -> None:
    chat = transformers.AutoTokenizer.from_pretrained(trained).apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False
    )
    for folder, (ids, names, text, whole) in loaded_by(version, list(exports)).items():
        assert ids == [raw_ids(trained, text) for text in TEXTS], exports[folder]
        assert names == ["<|im_start|>", "<|im_end|>", "<|endoftext|>"], exports[folder]
        assert (text, whole) == (chat, raw_ids(trained, "a")), exports[folder]


@pytest.mark.parametrize("version", ["5", "4"])
def test_exports_keep_bos_as_the_tokenizer_has_it(version: str, trained: Path, tmp_path: Path) -> None:
    own = adds_bos(variant(trained, tmp_path / "own", {}))
    without = variant(trained, tmp_path / "none", {"bos_token": None, "chat_template": None}, chat_template={
        "chat_template": CHATML
    })  # fmt: skip
    folders = [str(exported("minimind3", folder, tmp_path / folder.name / "out")) for folder in (own, without)]
    found = loaded_by(version, folders)
    assert [found[folder][3] for folder in folders] == [[1, *raw_ids(trained, "a")], raw_ids(trained, "a")]
    assert found[folders[1]][1:3] == [[None, "<|im_end|>", "<|endoftext|>"], "<|im_start|>user\nhi<|im_end|>\n"]
    for folder, bos in zip(folders, (1, None), strict=True):
        for name in ("config.json", "generation_config.json"):
            assert json.loads((Path(folder) / name).read_text())["bos_token_id"] == bos


# ------------------------------------------------------------------ bos


def converted(folder: Path, tmp_path: Path, text: str, bos: bool, eod: bool) -> list[int]:
    """The one document of a converted text."""
    (tmp_path / "one.jsonl").write_text(json.dumps({"text": text}) + "\n" + json.dumps({"text": ""}) + "\n")
    name = f"out-{folder.name}-{bos}-{eod}"
    options = Options(str(tmp_path / "one.jsonl"), str(folder), str(tmp_path / name), prepend_bos=bos, append_eod=eod)
    [prefix] = convert(options)
    assert len(read_index(prefix).lengths) == 1
    found: list[int] = np.fromfile(bin_path(prefix), np.int32).tolist()
    return found


def prompt_and_document(folder: Path, text: str, tmp_path: Path) -> tuple[list[int], list[int]]:
    """What generation with RAW=1 and the perplexity of a text read."""
    info = tokenizer_info(folder)
    tokenizer = load_tokenizer(info)
    loaded = Loaded(None, tokenizer, info, SMALL["minimind3"], "")
    (tmp_path / "text.jsonl").write_text(json.dumps({"text": text}))
    [(document, _)] = evaluation.documents(str(tmp_path / "text.jsonl"), loaded)
    return PromptEncoder(tokenizer, raw=True)(from_text(text)), document


def test_a_tokenizer_that_adds_bos_gives_one_bos(trained: Path, tmp_path: Path) -> None:
    folder = adds_bos(variant(trained, tmp_path / "tk", {}))
    ids = raw_ids(trained, "海边的风")
    for bos in (True, False):
        for eod in (True, False):
            assert converted(folder, tmp_path, "海边的风", bos, eod) == [1, *ids, *([2] * eod)]
    assert prompt_and_document(folder, "海边的风", tmp_path) == ([1, *ids], [1, *ids, 2])


def test_a_tokenizer_that_adds_both_gives_both_once(trained: Path, tmp_path: Path) -> None:
    folder = variant(trained, tmp_path / "tk", {})
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokens = [("<|im_start|>", 1), ("<|im_end|>", 2)]
    tokenizer.post_processor = TemplateProcessing(single="<|im_start|> $A <|im_end|>", special_tokens=tokens)
    tokenizer.save(str(folder / "tokenizer.json"))
    ids = raw_ids(trained, "hello")
    assert converted(folder, tmp_path, "hello", True, True) == [1, *ids, 2]
    assert prompt_and_document(folder, "hello", tmp_path) == ([1, *ids], [1, *ids, 2])


def test_a_tokenizer_without_bos_gives_eos_only(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = variant(trained, tmp_path / "tk", {"bos_token": None})
    ids = raw_ids(trained, "海边的风")
    assert converted(folder, tmp_path, "海边的风", True, True) == [*ids, 2]
    assert "has no bos_token" in capsys.readouterr().err
    assert prompt_and_document(folder, "海边的风", tmp_path) == (ids, [*ids, 2])


def test_a_bos_outside_of_the_vocabulary_is_refused(trained: Path, tmp_path: Path) -> None:
    folder = variant(trained, tmp_path / "tk", {"bos_token": "<bos>"})
    with pytest.raises(UserError, match="'<bos>' is not in the vocabulary"):
        converted(folder, tmp_path, "hello", True, True)


def test_special_tokens_that_are_ordinary_in_the_vocabulary_are_one_token(trained: Path, tmp_path: Path) -> None:
    """transformers' constructor would turn them into added tokens, and a text that has them into other ids."""
    folder = variant(trained, tmp_path / "tk", {"bos_token": "a", "eos_token": "z", "added_tokens_decoder": None})
    vocabulary = Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab()
    bos, eos, ids = vocabulary["a"], vocabulary["z"], raw_ids(trained, "hello assistant")
    assert converted(folder, tmp_path, "hello assistant", True, True) == [bos, *ids, eos]
    assert prompt_and_document(folder, "hello assistant", tmp_path) == ([bos, *ids], [bos, *ids, eos])


# ------------------------------------------------------------------ conversations

MESSAGES = [
    {"role": "user", "content": "17+25=?"},
    {"role": "assistant", "content": "42"},
    {"role": "user", "content": "and 1?"},
    {"role": "assistant", "content": "43 hello"},
]
QWEN3 = CHATML.replace(
    "{{ m.content }}",
    "{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}{{ m.content }}",
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<tts_pad>{{ m.role }}<tts_text_bos>\n\n{{ m.content }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<tts_pad>assistant<tts_text_bos>\n\n{% endif %}"
)
# name: changes, and what stands before and after an answer
TEMPLATES = {
    "no bos": ({"bos_token": None, "chat_template": CHATML}, r"<\|im_start\|>assistant\n(.*?<\|im_end\|>\n)"),
    "no bos, thoughts": ({"bos_token": None, "chat_template": QWEN3}, r"<\|im_start\|>assistant\n(.*?<\|im_end\|>\n)"),
    "bos elsewhere": ({"chat_template": LLAMA3}, r"<tts_pad>assistant<tts_text_bos>\n\n(.*?<\|im_end\|>)"),
}


def sample(folder: Path) -> tuple[list[int], list[int]]:
    """Ids and labels of MESSAGES."""
    options = Options("-", str(folder), handler="MiniMindInstructionHandler")
    info = tokenizer_info(folder)
    validate(options, info)
    stage = make_stage(replace(options, chat=replace(options.chat, system_ratio=0.0, empty_think_ratio=1.0)), info,
                       load_encoder(folder))  # fmt: skip
    prepared = stage.prepare({"conversations": MESSAGES})
    sequences = stage.encode([prepared]).sequences  # type: ignore[list-item]
    return sequences["input_ids"][0].tolist(), sequences["labels"][0].tolist()


@pytest.mark.parametrize("name", TEMPLATES)
def test_answers_are_found_in_a_template_with_other_marks(name: str, trained: Path, tmp_path: Path) -> None:
    change, answers = TEMPLATES[name]
    folder = variant(trained, tmp_path / "tk", change)
    reference = transformers.AutoTokenizer.from_pretrained(folder)
    text = reference.apply_chat_template(MESSAGES, tokenize=False)
    encoded = reference(text, add_special_tokens=False, return_offsets_mapping=True)
    spans = [match.span(1) for match in re.finditer(answers, text, re.S)]
    expected = [
        token if any(start <= a and b <= stop for start, stop in spans) else -100
        for token, (a, b) in zip(encoded.input_ids, encoded.offset_mapping, strict=True)
    ]
    assert sample(folder) == (encoded.input_ids, expected) and len(spans) == 2
    prompt = PromptEncoder(load_tokenizer(tokenizer_info(folder)), raw=False)(from_text("17+25=?"))
    rendered = reference.apply_chat_template(MESSAGES[:1], tokenize=False, add_generation_prompt=True)
    assert prompt == reference(rendered, add_special_tokens=False).input_ids


def test_conversations_of_a_tokenizer_that_adds_bos_have_the_templates_tokens_alone(
    trained: Path, tmp_path: Path
) -> None:
    folder = adds_bos(variant(trained, tmp_path / "tk", {}))
    reference = transformers.AutoTokenizer.from_pretrained(folder)
    ids, labels = sample(folder)
    assert ids == reference.apply_chat_template(MESSAGES, tokenize=True, return_dict=False)
    assert labels == sample(trained)[1]


def test_a_template_without_an_opening_is_refused(trained: Path, tmp_path: Path) -> None:
    template = "{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}"
    folder = variant(trained, tmp_path / "tk", {"bos_token": None, "chat_template": template})
    with pytest.raises(UserError, match="expected a text that opens the answer"):
        sample(folder)


@pytest.mark.parametrize("added", [True, False])
def test_the_map_and_the_config_are_merged_as_transformers_merges_them(
    added: bool, trained: Path, tmp_path: Path
) -> None:
    change: Change = {"bos_token": "<|box_start|>", "eos_token": "<|im_end|>"}
    change |= {} if added else {"added_tokens_decoder": None}
    others = {"bos_token": "<|im_start|>", "eos_token": "<|box_end|>", "unk_token": "<|endoftext|>"}
    folder = variant(trained, tmp_path / "tk", change, special_tokens_map=others)
    reference = transformers.AutoTokenizer.from_pretrained(folder)
    info, tokenizer = tokenizer_info(folder), load_tokenizer(tokenizer_info(folder))
    assert (info.bos_id, info.eos_id) == (reference.bos_token_id, reference.eos_token_id)
    assert (tokenizer.bos_token, tokenizer.eos_token) == (reference.bos_token, reference.eos_token)


def test_a_chat_template_of_chat_template_json_is_used(trained: Path, tmp_path: Path) -> None:
    folder = variant(trained, tmp_path / "tk", {"chat_template": None}, chat_template={"chat_template": CHATML})
    ids, _ = sample(folder)
    text = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in MESSAGES)
    assert ids == raw_ids(trained, text)
