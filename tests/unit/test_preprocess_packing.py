"""The files of conversations: their names and type, packing as MindSpeed-LLM's, nothing lost without a word."""

from __future__ import annotations

import json
import random
import re
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from minimind_mcore.errors import UserError
from minimind_mcore.preprocess import main as preprocess
from minimind_mcore.preprocess import train_tokenizer
from minimind_mcore.preprocess.check import CHUNK, check_dataset, check_together, quick_check
from minimind_mcore.preprocess.convert import convert, preview
from minimind_mcore.preprocess.indexed import IndexedWriter, datasets_at, read_index
from minimind_mcore.preprocess.meta import read_meta
from minimind_mcore.preprocess.options import ChatOptions, Options
from minimind_mcore.preprocess.packing import plan_packs
from minimind_mcore.preprocess.tokenize import tokenizer_fingerprint

KEYS = ("input_ids", "attention_mask", "labels")
PAD = 0


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    directory = str(tmp_path_factory.mktemp("tokenizer") / "tk")
    train_tokenizer.save(train_tokenizer.train(iter(["assistant user system 你好 " * 9]), 310), directory)
    return directory


def dialogues(count: int, seed: int = 0) -> list[dict[str, Any]]:
    generator = random.Random(seed)
    turns = []
    for number in range(count):
        text = " ".join(generator.choices(["user", "你好", "assistant", "x"], k=generator.randint(1, 25)))
        turns.append([{"role": "user", "content": f"{number} {text}"}, {"role": "assistant", "content": text}])
    return [{"conversations": conversation} for conversation in turns]


def write(path: Path, records: list[Any]) -> Path:
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def plain(tokenizer: str, tmp_path_factory: pytest.TempPathFactory) -> Options:
    """A finished conversion of 120 dialogues, one sample to a sequence."""
    folder = tmp_path_factory.mktemp("plain")
    source = write(folder / "sft.jsonl", dialogues(120))
    options = Options(str(source), tokenizer, str(folder / "sft"), handler="MiniMindInstructionHandler")
    assert convert(options) == [str(folder / "sft")]
    return options


def sequences(prefix: str, key: str) -> list[list[int]]:
    index = read_index(f"{prefix}_packed_{key}_document")
    assert index.dtype == np.int32
    tokens = np.fromfile(f"{prefix}_packed_{key}_document.bin", np.int32)
    return [part.tolist() for part in np.split(tokens, np.cumsum(index.lengths)[:-1])]


def all_files(prefix: str) -> dict[str, bytes]:
    paths = Path(prefix).parent.glob(f"{Path(prefix).name}_packed_*_document.[bi]*")
    return {path.name.partition("_packed_")[2]: path.read_bytes() for path in paths}


# ------------------------------------------------------------------ the files


def test_files_are_those_that_mindspeed_llm_reads(plain: Options, tokenizer: str) -> None:
    """Named and typed so, one sequence to a document, labels as long as the ids and equal to them or -100."""
    prefix = str(plain.output_prefix)
    assert set(all_files(prefix)) == {f"{key}_document.{end}" for key in KEYS for end in ("bin", "idx")}
    ids, masks, labels = (sequences(prefix, key) for key in KEYS)
    assert len(ids) == 120 and [len(i) for i in ids] == [len(i) for i in labels]
    assert all(set(mask) == {1} and len(mask) == len(i) for mask, i in zip(masks, ids, strict=True))
    assert all(b in (a, -100) for i, j in zip(ids, labels, strict=True) for a, b in zip(i, j, strict=True))
    for key in KEYS:
        quick_check(f"{prefix}_packed_{key}_document", tokenizer_fingerprint(tokenizer), 310)
        meta = read_meta(f"{prefix}_packed_{key}_document")
        assert meta is not None and meta.chat is not None and (meta.samples, meta.truncated) == (120, 0)
        assert (meta.chat["system_ratio"], meta.chat["seed"]) == (0.2, 1234)


def test_samples_depend_on_the_seed_and_not_on_workers_or_shards(plain: Options, tmp_path: Path) -> None:
    expected = all_files(str(plain.output_prefix))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(dialogues(120)), tmp_path / "a.parquet", row_group_size=20)
    other = replace(plain, output_prefix=str(tmp_path / "other"), workers=2, n_subs=7, backend="tokenizers")
    other = replace(other, input=str(tmp_path / "a.parquet"))
    convert(other)
    assert all_files(str(other.output_prefix)) == expected
    seeded = replace(other, output_prefix=str(tmp_path / "seeded"), chat=ChatOptions(seed=5), workers=1, n_subs=1)
    convert(seeded)
    assert all_files(str(seeded.output_prefix)) != expected


def test_the_same_request_is_found_again(plain: Options, capfd: pytest.CaptureFixture[str]) -> None:
    assert convert(plain) == preview(plain) == [plain.output_prefix]
    assert capfd.readouterr().err.count("up to date") == 2


def test_tasks_keep_what_is_beside_them_in_their_order(tokenizer: str, tmp_path: Path) -> None:
    records = []
    for number in range(60):
        asked = {"role": "user", "content": f"q{number} " * (1 + number % 9)}
        records.append({"conversations": [asked, {"role": "assistant", "content": ""}], "gt": [str(number)]})
    source = write(tmp_path / "agent.jsonl", records)
    options = Options(str(source), tokenizer, str(tmp_path / "agent"), handler="MiniMindAgentHandler", seq_length=40)
    [prefix] = convert(replace(options, n_subs=5))
    ids = sequences(prefix, "input_ids")
    beside = [json.loads(line) for line in Path(f"{prefix}_packed_prompts.jsonl").read_text().splitlines()]
    meta = read_meta(f"{prefix}_packed_input_ids_document")
    assert meta is not None and meta.too_long > 0 and meta.too_long + len(ids) == 60 and len(beside) == len(ids)
    from tokenizers import Tokenizer

    reference = Tokenizer.from_file(f"{tokenizer}/tokenizer.json")
    for task, prompt in zip(beside, ids, strict=True):
        assert reference.encode(task["prompt"]).ids == prompt
        assert task["prompt"].split("user\n")[1].startswith(f"q{task['gt'][0]} ")
    assert check_together(datasets_at(prefix)) == []
    with open(f"{prefix}_packed_prompts.jsonl", "a") as file:
        file.write("{}\n")
    assert f"{len(ids) + 1} lines for {len(ids)} tasks" in check_together(datasets_at(prefix))[0]


def test_an_answer_that_changed_after_the_conversion_is_refused(tokenizer: str, tmp_path: Path) -> None:
    record = {"conversations": [{"role": "user", "content": "6*7"}, {"role": "assistant", "content": ""}], "gt": ["42"]}
    source = write(tmp_path / "agent.jsonl", [record])
    options = Options(str(source), tokenizer, str(tmp_path / "agent"), handler="MiniMindAgentHandler", seq_length=40)
    [prefix] = convert(options)
    file, column = Path(f"{prefix}_packed_prompts.jsonl"), f"{prefix}_packed_input_ids_document"
    quick_check(column)
    before = file.read_bytes()
    file.write_bytes(before.replace(b"42", b"43"))
    with pytest.raises(UserError, match=re.escape(f"{file}: content differs from its recorded SHA-256")):
        quick_check(column)
    assert any(str(file) in problem for problem in check_dataset(column))
    convert(options)  # the same request repairs it
    assert file.read_bytes() == before


def test_all_ids_of_data_without_a_record_are_compared_on_demand(tmp_path: Path) -> None:
    prefix = tmp_path / "theirs"
    with IndexedWriter(prefix, "int32") as writer:
        writer.add(np.append(np.ones(CHUNK, np.int32), 512), np.array([CHUNK + 1]))
    quick_check(prefix, vocab_size=512)
    with pytest.raises(UserError, match=f"token {CHUNK} is 512, outside of the tokenizer's vocabulary"):
        quick_check(prefix, vocab_size=512, everything=True)


def test_a_prefix_holds_one_kind_of_dataset(plain: Options, tmp_path: Path) -> None:
    """MindSpeed-LLM reads everything under a prefix together."""
    source = write(tmp_path / "dpo.jsonl", [{"chosen": [], "rejected": []}])
    other = replace(plain, input=str(source), handler="MiniMindPairwiseHandler")
    with pytest.raises(UserError, match=r"holds other datasets .*_packed_attention_mask_document"):
        convert(other)


def test_an_interrupted_conversion_goes_on_from_its_parts(
    plain: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    options = replace(plain, output_prefix=str(tmp_path / "out"), n_subs=3)
    with monkeypatch.context() as patched:
        patched.setattr("minimind_mcore.preprocess.convert.write_meta", lambda *_: signal.raise_signal(signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            convert(options)
    assert read_meta(tmp_path / "out_packed_input_ids_document") is None
    convert(options)
    assert "(3 done before)" in capfd.readouterr().err
    assert all_files(str(tmp_path / "out")) == all_files(str(plain.output_prefix))


def test_bad_records_are_located(tokenizer: str, tmp_path: Path) -> None:
    records = dialogues(6)
    records[1] = {"conversations": [{"role": "user", "content": "no answer"}]}
    records[4] = {"conversations": [{"role": "bot", "content": "x"}]}
    source = write(tmp_path / "a.jsonl", records)
    with open(source, "a") as file:
        file.write("oops\n")
    options = Options(str(source), tokenizer, str(tmp_path / "out"), handler="MiniMindInstructionHandler")
    with pytest.raises(UserError, match=r"3 of 7 records cannot be used"):
        convert(options)
    assert not all_files(str(tmp_path / "out"))
    convert(replace(options, max_reject_rate=0.5))
    rejects = [json.loads(line) for line in (tmp_path / "out.rejects.jsonl").read_text().splitlines()]
    assert [(entry["line"], entry["file"]) for entry in rejects] == [
        (2, str(source)),
        (5, str(source)),
        (7, str(source)),
    ]
    reasons = ("no answer of the assistant", "has the role 'bot'", "malformed JSON")
    assert all(reason in entry["reason"] for reason, entry in zip(reasons, rejects, strict=True))
    assert len(sequences(str(tmp_path / "out"), "labels")) == 4


# ------------------------------------------------------------------ packing


def reference_knapsack(lengths: list[int], capacity: int) -> list[list[int]]:
    """Sequences as lists of sample numbers: always the longest sample that fits, of equals the last."""
    left, packs = sorted(range(len(lengths)), key=lambda i: (lengths[i], i)), []
    while left:
        pack, room = [], capacity
        while fitting := [i for i in left if lengths[i] <= room]:
            left.remove(fitting[-1])
            pack.append(fitting[-1])
            room -= lengths[fitting[-1]]
        packs.append(pack)
    return packs


@pytest.mark.parametrize("capacity", [1, 7, 50])
def test_the_plan_is_the_greedy_knapsack(capacity: int) -> None:
    for seed in range(20):
        lengths = np.random.default_rng(seed).integers(1, capacity + 1, 60)
        plan = plan_packs(lengths, capacity)
        packs = [part.tolist() for part in np.split(plan.order, np.cumsum(plan.sizes)[:-1])]
        assert packs == reference_knapsack(lengths.tolist(), capacity)


@pytest.mark.parametrize("pack", ["pack", "neat-pack"])
def test_packed_files_equal_a_reference(pack: str, plain: Options, tmp_path: Path) -> None:
    length = 90
    neat = pack == "neat-pack"
    options = replace(
        plain, output_prefix=str(tmp_path / "packed"), seq_length=length, chat=ChatOptions(pack=pack), n_subs=3
    )
    [prefix] = convert(options)
    whole = [sequences(str(plain.output_prefix), key) for key in ("input_ids", "labels")]
    samples = [(ids, labels) for ids, labels in zip(*whole, strict=True) if neat or len(ids) < length]
    samples = [(ids[: length - 1], labels[: length - 1]) for ids, labels in samples]
    samples = [(ids, labels) for ids, labels in samples if set(labels) != {-100}]
    packs = reference_knapsack([len(ids) for ids, _ in samples], length - 1)
    ids, masks, labels = (sequences(prefix, key) for key in KEYS)
    for number, chosen in enumerate(packs):
        filling = length - sum(len(samples[i][0]) for i in chosen)
        assert filling >= 1
        assert ids[number] == [t for i in chosen for t in samples[i][0]] + [PAD] * filling
        assert labels[number] == [t for i in chosen for t in samples[i][1]] + [-100] * filling
        numbers = [k for k, i in enumerate(chosen, 1) for _ in samples[i][0]]
        assert masks[number] == (numbers + [0] * filling if neat else [1] * length)
    assert len(ids) == len(packs)
    meta = read_meta(f"{prefix}_packed_labels_document")
    too_long = sum(len(i) >= length for i in whole[0])
    assert meta is not None and too_long > 5 and meta.samples == len(samples)
    if neat:
        assert meta.truncated + meta.too_long == too_long and meta.truncated > 5
    else:
        assert (meta.too_long, meta.truncated) == (too_long, 0)
    assert check_together(datasets_at(prefix)) == []
    assert all(check_dataset(found) == [] for found in datasets_at(prefix))


# ------------------------------------------------------------------ checking


def test_the_check_covers_all_datasets_of_a_prefix(plain: Options, capsys: pytest.CaptureFixture[str]) -> None:
    preprocess.main(["--check", str(plain.output_prefix)])
    out = capsys.readouterr().out
    assert out.count("samples              120 (not packed), 0 cut") == 3
    preprocess.main(["--input", str(plain.output_prefix), "--tokenizer-name-or-path", plain.tokenizer])
    assert capsys.readouterr().out == f"{plain.output_prefix}\n"


def test_the_check_knows_labels_from_ids_and_finds_what_does_not_belong(tmp_path: Path, tokenizer: str) -> None:
    for key, values in (("input_ids", [5, 6, -100]), ("labels", [-100, 6, 400]), ("attention_mask", [1, 1, 999])):
        with IndexedWriter(tmp_path / f"x_packed_{key}_document") as writer:
            writer.add(np.array(values), np.array([2, 1] if key == "labels" else [3]))
    problems = {
        key: check_dataset(tmp_path / f"x_packed_{key}_document", preprocess.tokenizer_info(tokenizer)) for key in KEYS
    }
    assert "token 2 is -100" in problems["input_ids"][0] and "token 2 is 400" in problems["labels"][0]
    assert problems["attention_mask"] == []
    assert "they do not belong together" in check_together(datasets_at(tmp_path / "x"))[0]


# ------------------------------------------------------------------ descriptions in files


def test_a_yaml_file_gives_flags_and_the_command_line_wins(
    plain: Options, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "data set.yaml"
    config.write_text(
        f"input: {plain.input}\ntokenizer_name_or_path: '{plain.tokenizer}'\noutput-prefix: {tmp_path}/unused\n"
        "handler_name: MiniMindInstructionHandler\npack: true\nneat_pack: false\nseq_length: 200\n"
        "map_keys: {messages: conversations}\nworkers: 1\n"
    )
    preprocess.main(["--config", str(config), "--output-prefix", f"{tmp_path}/out"])
    assert capsys.readouterr().out == f"{tmp_path}/out\n"
    assert {len(row) for row in sequences(f"{tmp_path}/out", "labels")} == {200}
    for content, message in (
        ("- a", "expected a mapping"),
        ("a: [", "data set.yaml"),
        ("pakc: true", "did you mean --pack"),
    ):
        config.write_text(content)
        with pytest.raises(UserError, match=message):
            preprocess.main([f"--config={config}"])
    with pytest.raises(UserError, match="No such file"):
        preprocess.main(["--config", str(tmp_path / "none.yaml")])


def test_llama_factorys_description_of_datasets_is_read(
    tokenizer: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "a.jsonl", [{"q": f"q{number}", "a": "b"} for number in range(4)])
    columns = {"prompt": "q", "query": None, "response": "a"}
    info = {
        "one": {"file_name": "a.jsonl", "columns": columns},
        "two": {"file_name": "b.jsonl", "formatting": "sharegpt"},
    }
    (tmp_path / "dataset_info.json").write_text(json.dumps(info))
    words = ["--handler-name", "LlamaFactoryInstructionHandler", "--tokenizer-name-or-path", tokenizer]
    words += ["--output-prefix", str(tmp_path / "out")]
    preprocess.main([*words, "--dataset-dir", str(tmp_path), "--input", "one", "--prompt-type", "chatml_de"])
    assert len(sequences(capsys.readouterr().out.strip(), "labels")) == 4
    for extra, message in (
        (["--input", "one"], "--dataset-dir is missing"),
        (["--input", "three", "--dataset-dir", str(tmp_path)], "it has one, two"),
        (["--input", "one,two", "--dataset-dir", str(tmp_path)], "convert them one by one"),
    ):
        with pytest.raises(UserError, match=message):
            preprocess.main([*words, *extra])
