"""Conversion: the files are Megatron's, the tokens are transformers', no record is lost or let in silently."""

from __future__ import annotations

import gzip
import json
import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from minimind_mcore.errors import UserError
from minimind_mcore.preprocess import main as preprocess
from minimind_mcore.preprocess import readers, train_tokenizer
from minimind_mcore.preprocess.check import check_dataset, quick_check
from minimind_mcore.preprocess.convert import convert, preview
from minimind_mcore.preprocess.handlers import Handler, find_handler
from minimind_mcore.preprocess.indexed import IndexedWriter, merge, read_index
from minimind_mcore.preprocess.meta import read_meta
from minimind_mcore.preprocess.options import Options
from minimind_mcore.preprocess.tokenize import tokenizer_fingerprint, tokenizer_info

PAIR = (".bin", ".idx")


def some_texts(count: int, seed: int = 0) -> list[str]:
    generator = random.Random(seed)
    words = [
        "train",
        "token",
        "你好",
        "世界",
        "model",
        "学习",
        "data\n",
        "12",
        "+",
        "<|im_end|>",
        "<think>",
        "😀",
        "\u2028",
    ]
    return [" ".join(generator.choices(words, k=generator.randint(1, 60))) for _ in range(count)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    directory = tmp_path_factory.mktemp("tokenizer")
    write_jsonl(directory / "corpus.jsonl", some_texts(300))
    arguments = ["--input", str(directory / "corpus.jsonl"), "--output", str(directory / "tk"), "--vocab-size", "320"]
    train_tokenizer.main(arguments)
    return str(directory / "tk")


def write_jsonl(path: Path, texts: list[str], ascii_only: bool = False) -> Path:
    path.write_text("".join(json.dumps({"text": t}, ensure_ascii=ascii_only) + "\n" for t in texts), encoding="utf-8")
    return path


def prepare(source: str, tokenizer: str, cache: str, append_eod: bool = True, workers: int = 1) -> str:
    """The converted prefix, under a name by content."""
    options = Options(source, tokenizer, None, cache, append_eod=append_eod, prepend_bos=True, workers=workers)
    return convert(options)[0]


def files_of(prefix: str) -> tuple[bytes, ...]:
    return tuple(Path(prefix + suffix).read_bytes() for suffix in PAIR)


def documents(prefix: str) -> list[list[int]]:
    index = read_index(prefix)
    tokens = np.fromfile(prefix + ".bin", index.dtype)
    return [part.tolist() for part in np.split(tokens, np.cumsum(index.lengths)[:-1])]


def rejects_of(prefix: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(f"{prefix}.rejects.jsonl").read_text(encoding="utf-8").splitlines()]


# ------------------------------------------------------------------ the format


def megatron_builder() -> Any:
    return pytest.importorskip("megatron.core.datasets.indexed_dataset")


@pytest.mark.parametrize("dtype", ["int32", "uint16"])
def test_files_are_those_of_megatrons_builder(dtype: str, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    module = megatron_builder()
    generator = np.random.default_rng(0)
    lengths = generator.integers(1, 60, 500)
    tokens = generator.integers(0, 6400, lengths.sum()).astype(np.uint32)
    cut = int(lengths[:200].sum())
    with IndexedWriter(tmp_path / "ours", dtype) as writer:
        writer.add(tokens[:cut], lengths[:200])
        writer.add(tokens[cut:], lengths[200:])
    builder = module.IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=getattr(np, dtype))
    for document in np.split(tokens.astype(np.int64), np.cumsum(lengths)[:-1]):
        builder.add_document(torch.from_numpy(document), [len(document)])
    builder.finalize(str(tmp_path / "theirs.idx"))
    assert files_of(str(tmp_path / "ours")) == files_of(str(tmp_path / "theirs"))

    builder = module.IndexedDatasetBuilder(str(tmp_path / "joined.bin"), dtype=getattr(np, dtype))
    for _ in range(2):
        builder.add_index(str(tmp_path / "theirs"))
    builder.finalize(str(tmp_path / "joined.idx"))
    merge([tmp_path / "ours", tmp_path / "ours"], tmp_path / "merged")
    assert files_of(str(tmp_path / "merged")) == files_of(str(tmp_path / "joined"))


def test_megatron_reads_what_transformers_would_tokenize(tokenizer: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    module = megatron_builder()
    texts = some_texts(100)
    source = write_jsonl(tmp_path / "a.jsonl", texts)
    [prefix] = convert(Options(str(source), tokenizer, str(tmp_path / "out"), append_eod=True, prepend_bos=True))
    assert prefix == str(tmp_path / "out_text_document")
    reference = transformers.AutoTokenizer.from_pretrained(tokenizer)
    dataset = module.IndexedDataset(prefix)
    assert dataset.index.dtype == np.int32 and len(dataset) == len(texts)
    for text, found in zip(texts, dataset, strict=True):
        assert found.tolist() == [reference.bos_token_id, *reference(text).input_ids, reference.eos_token_id]
    assert dataset.document_indices.tolist() == list(range(len(texts) + 1))


@pytest.mark.parametrize("bos, eod", [(False, False), (True, False), (False, True)])
def test_begin_and_end_tokens_are_added_on_request_only(bos: bool, eod: bool, tokenizer: str, tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", ["one", "two"])
    options = Options(str(source), tokenizer, str(tmp_path / "plain"))
    plain = documents(convert(options)[0])
    marked = convert(replace(options, output_prefix=str(tmp_path / "marked"), prepend_bos=bos, append_eod=eod))[0]
    assert documents(marked) == [[1] * bos + ids + [2] * eod for ids in plain]


# ------------------------------------------------------------------ one result, however it is made


def test_result_does_not_depend_on_workers_subsets_or_backend(tokenizer: str, tmp_path: Path) -> None:
    sources = [
        write_jsonl(tmp_path / f"{name}.jsonl", some_texts(n, n)) for name, n in (("b", 300), ("a", 7), ("c", 40))
    ]
    options = Options(",".join(map(str, sources)), tokenizer, str(tmp_path / "one"), append_eod=True)
    expected = files_of(convert(options)[0])
    assert documents(str(tmp_path / "one_text_document"))[300] == documents_of_text(
        tokenizer, some_texts(7, 7)[0], tmp_path
    )
    variants = [{"n_subs": 9}, {"workers": 3, "n_subs": 5}, {"backend": "tokenizers", "n_subs": 100, "workers": 2}]
    for number, variant in enumerate(variants):
        prefix = str(tmp_path / f"variant{number}")
        assert files_of(convert(replace(options, output_prefix=prefix, **variant))[0]) == expected  # type: ignore[arg-type]


def documents_of_text(tokenizer: str, text: str, tmp_path: Path) -> list[int]:
    source = write_jsonl(tmp_path / "single.jsonl", [text])
    return documents(convert(Options(str(source), tokenizer, str(tmp_path / "single"), append_eod=True))[0])[0]


def test_every_shard_boundary_leaves_every_line_once(tokenizer: str, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\n\n{"text": "bb"}\r\n  \n{"text": "ccc"}\n{"text": "dddd"}')
    [source] = readers.find_sources(str(path))
    for start in range(source.size + 1):
        shards = [readers.InputShard(source, i, j, j - i) for i, j in ((0, start), (start, source.size))]
        found = [
            [item for item in readers.ShardReader(shard, ["text"])] for shard in shards if shard.start < shard.stop
        ]
        assert [r["text"] for part in found for _, r in part if r is not None] == ["a", "bb", "ccc", "dddd"]
        assert sum(len(part) for part in found) == 6
        assert all([number for number, _ in part] == list(range(1, len(part) + 1)) for part in found)


def as_json(path: Path, texts: list[str]) -> None:
    path.write_text(json.dumps([{"text": t, "n": [1, {"x": "]"}]} for t in texts], indent=1), encoding="utf-8")


def as_parquet(path: Path, texts: list[str]) -> None:
    table = pyarrow.table({"id": list(range(len(texts))), "text": texts})
    pyarrow.parquet.write_table(table, path, row_group_size=7)


def as_gzip(path: Path, texts: list[str]) -> None:
    lines = [json.dumps({"text": t}).encode() + b"\n" for t in texts]
    path.write_bytes(gzip.compress(b"".join(lines[:50])) + gzip.compress(b"".join(lines[50:])))


def as_zstd(path: Path, texts: list[str]) -> None:
    with pyarrow.output_stream(str(path), compression="zstd") as stream:
        stream.write("".join(json.dumps({"text": t}) + "\n" for t in texts).encode())


def as_gzipped_array(path: Path, texts: list[str]) -> None:
    path.write_bytes(gzip.compress(json.dumps([{"text": t} for t in texts]).encode()))


def as_json_lines(path: Path, texts: list[str]) -> None:
    write_jsonl(path, texts, ascii_only=True)


WRITERS: dict[str, Callable[[Path, list[str]], None]] = {
    "a.json": as_json,
    "lines.json": as_json_lines,
    "a.parquet": as_parquet,
    "a.jsonl.gz": as_gzip,
    "a.jsonl.zst": as_zstd,
    "a.json.gz": as_gzipped_array,
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_format_gives_what_jsonl_gives(name: str, tokenizer: str, tmp_path: Path) -> None:
    texts = some_texts(120)
    expected = convert(Options(str(write_jsonl(tmp_path / "plain.jsonl", texts)), tokenizer, str(tmp_path / "plain")))
    WRITERS[name](tmp_path / name, texts)
    found = convert(Options(str(tmp_path / name), tokenizer, str(tmp_path / "other"), n_subs=3))
    assert files_of(found[0]) == files_of(expected[0])


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.txt.zst"])
def test_each_line_of_a_text_file_is_a_document(name: str, tokenizer: str, tmp_path: Path) -> None:
    texts = ['first "line"', "  第二行 ", "third\ttab \u2028 still third"]
    content = ("\ufeff" + texts[0] + "\n\n" + texts[1] + "\r\n" + texts[2]).encode()
    with pyarrow.output_stream(str(tmp_path / name)) as stream:  # compresses by the name
        stream.write(content)
    expected = convert(Options(str(write_jsonl(tmp_path / "plain.jsonl", texts)), tokenizer, str(tmp_path / "plain")))
    found = convert(Options(str(tmp_path / name), tokenizer, str(tmp_path / "other")))
    assert files_of(found[0]) == files_of(expected[0])


def test_a_directory_is_read_in_the_order_of_its_paths(tokenizer: str, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    (folder / "deep").mkdir(parents=True)
    texts = {"b.jsonl": "second", "deep/c.jsonl": "third", "a.jsonl": "first"}
    for name, text in texts.items():
        write_jsonl(folder / name, [text])
    (folder / "x.parts" / "1234").mkdir(parents=True)
    for ignored in ("README.md", ".hidden.jsonl", "x.rejects.jsonl", "x.meta.json", "x.parts/1234/00000.json"):
        (folder / ignored).write_text('{"text": "not this"}\n')
    (folder / "d.txt").write_text("fourth\n")
    expected = write_jsonl(tmp_path / "all.jsonl", ["first", "second", "third", "fourth"])
    plain = files_of(convert(Options(str(expected), tokenizer, str(tmp_path / "plain")))[0])
    by_path = sorted(Path(s.path) for s in readers.find_sources(str(folder)))
    assert [Path(s.path) for s in readers.find_sources(str(folder))] == by_path
    mixed = f"{folder}/a.jsonl, {folder}/b*.jsonl,{folder}/deep,{folder}/*.txt"
    assert files_of(convert(Options(mixed, tokenizer, str(tmp_path / "mixed")))[0]) == plain


ALPACA_HEAD = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions.USER: Below is an instruction that describes a task. Write a response "
    "that appropriately completes the request.\n\n### Instruction:\n"
)
# (handler, keys, record, its text under MindSpeed-LLM, data_handler.py)
HANDLED: list[tuple[str, str, dict[str, Any], str]] = [
    (
        "AlpacaPretrainHandler", "text", {"instruction": "Add.", "input": "1 2", "output": "3"},
        ALPACA_HEAD + "Add.\n\n### Input:\n1 2\n\n### Response: ASSISTANT: 3",
    ),
    (
        "AlpacaPretrainHandler", "text", {"instruction": "问好", "input": "", "output": "你好"},
        ALPACA_HEAD + "问好\n\n###None\n\n### Response: ASSISTANT: 你好",
    ),
    (
        "SharegptPretrainHandler", "conversations",
        {"conversations": [{"from": "human", "value": "1+1?"}, {"role": "assistant", "content": "2"}]}, "1+1?2",
    ),
]  # fmt: skip
UNUSABLE: list[tuple[str, str, dict[str, Any], str]] = [
    ("AlpacaPretrainHandler", "text", {"instruction": "Add."}, "field 'output' is missing"),
    ("AlpacaPretrainHandler", "text", {"instruction": "a", "input": 1, "output": "b"}, "not a string but a number"),
    ("SharegptPretrainHandler", "text", {"text": "hello"}, "not a list of turns but a string"),
    ("SharegptPretrainHandler", "c", {"c": [{"value": "a"}, {"from": "gpt"}]}, "turn 2 has no string"),
]


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
@pytest.mark.parametrize(("handler", "key", "record", "text"), HANDLED)
def test_handlers_give_mindspeed_llms_text(
    handler: str, key: str, record: dict[str, Any], text: str, suffix: str, tokenizer: str, tmp_path: Path
) -> None:
    source, plain = tmp_path / f"in{suffix}", write_jsonl(tmp_path / "plain.jsonl", [text])
    if suffix == ".jsonl":
        source.write_text(json.dumps(record) + "\n", encoding="utf-8")
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([record]), source)
    options = Options(str(source), tokenizer, str(tmp_path / "out"), handler=handler, keys=(key,), append_eod=True)
    [found] = convert(options)
    [expected] = convert(Options(str(plain), tokenizer, str(tmp_path / "plain"), append_eod=True))
    assert found == f"{tmp_path}/out_{key}_document"
    for part in PAIR:
        assert Path(found + part).read_bytes() == Path(expected + part).read_bytes()


@pytest.mark.parametrize(("handler", "key", "record", "reason"), UNUSABLE)
def test_handlers_reject_what_they_cannot_use(handler: str, key: str, record: dict[str, Any], reason: str) -> None:
    found = find_handler(handler)
    assert isinstance(found, Handler)
    rejected = found(record, [key])
    assert isinstance(rejected, readers.Reject) and reason in rejected.reason


def test_several_keys_become_several_datasets(tokenizer: str, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"title": "t1", "body": "b1"}\n{"title": "", "body": "b2"}\n')
    prefixes = convert(Options(str(path), tokenizer, str(tmp_path / "out"), keys=("title", "body")))
    assert prefixes == [str(tmp_path / "out_title_document"), str(tmp_path / "out_body_document")]
    assert [len(documents(prefix)) for prefix in prefixes] == [1, 2]
    meta = read_meta(prefixes[0])
    assert meta is not None and (meta.empty, meta.rejects, meta.written.documents) == (1, 0, 1)


# ------------------------------------------------------------------ bad records


BAD_LINES = {
    "malformed JSON": b'{"text": "cut off',
    "field 'text' is missing": b'{"txt": "wrong key"}',
    "field 'text' is null": b'{"text": null}',
    "field 'text' is not a string but a number": b'{"text": 3}',
    "field 'text' is not a string but an array": b'{"text": ["a"]}',
    "invalid UTF-8": b'{"text": "\xff\xfe"}',
    "lone surrogate": b'{"text": "x\\ud800y"}',
    "not an object": b'"just a string"',
    "malformed JSON: ": b"[" * 100_000,
    "malformed JSON: Exceeds": b'{"text": ' + b"1" * 5000 + b"}",
}


def test_each_bad_line_is_located_and_costs_only_itself(tokenizer: str, tmp_path: Path) -> None:
    lines: list[bytes] = []
    expected: list[tuple[int, str]] = []
    good = some_texts(4 * len(BAD_LINES))
    for number, text in enumerate(good):
        lines.append(json.dumps({"text": text}).encode())
        if number % 4 == 1:
            lines.append(b"")
        if number % 4 == 3:
            reason, line = list(BAD_LINES.items())[number // 4]
            lines.append(line)
            expected.append((len(lines), reason))
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n".join(lines))
    options = Options(str(path), tokenizer, str(tmp_path / "out"), max_reject_rate=0.5)
    for n_subs in (1, 13):
        [prefix] = convert(replace(options, n_subs=n_subs, overwrite=True))
        found = rejects_of(tmp_path / "out")
        assert [entry["line"] for entry in found] == [line for line, _ in expected]
        for entry, (_, reason) in zip(found, expected, strict=True):
            assert reason in entry["reason"] and entry["file"] == str(path)
        assert found[0]["content"] == '{"text": "cut off'
        assert len(documents(prefix)) == len(good)
        meta = read_meta(prefix)
        assert meta is not None and (meta.rejects, meta.records) == (len(expected), len(good) + len(expected))


def test_bad_elements_of_arrays_and_parquet_are_located(tokenizer: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(b'[\n{"text": "ok"},\n{"txt": 1},\n\n{"text": "\xff"}, 7]')
    table = pyarrow.table({"text": ["one", None, "three"]})
    pyarrow.parquet.write_table(table, tmp_path / "b.parquet", row_group_size=1)
    spec = f"{tmp_path}/a.json,{tmp_path}/b.parquet"
    convert(Options(spec, tokenizer, str(tmp_path / "out"), max_reject_rate=1.0, n_subs=50))
    found = [(Path(entry["file"]).name, entry["line"]) for entry in rejects_of(tmp_path / "out")]
    assert found == [("a.json", 3), ("a.json", 5), ("a.json", 5), ("b.parquet", 2)]


def test_too_many_rejects_stop_the_run_and_leave_no_dataset(tokenizer: str, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "good"}\n' * 1999 + "oops\n" * 3)
    options = Options(str(path), tokenizer, str(tmp_path / "out"))
    with pytest.raises(UserError, match=r"3 of 2002 records .* more than --max-reject-rate 0\.001"):
        convert(options)
    assert [entry["line"] for entry in rejects_of(tmp_path / "out")] == [2000, 2001, 2002]
    assert not list(tmp_path.glob("out_*"))
    [prefix] = convert(replace(options, max_reject_rate=0.01))
    assert len(documents(prefix)) == 1999


def test_a_wrong_file_is_given_up_early(tokenizer: str, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"content": "other key"}\n' * 5000)
    with pytest.raises(UserError, match=r"1000 of 1000 records in a row .* 'text' is missing"):
        convert(Options(str(path), tokenizer, str(tmp_path / "out")))
    assert not list(tmp_path.glob("out_*"))


# ------------------------------------------------------------------ done once


def test_the_same_request_is_recognised_and_another_is_not(tokenizer: str, tmp_path: Path, capfd: Any) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", some_texts(20))
    cache = str(tmp_path / "cache")
    first = prepare(str(source), tokenizer, cache, workers=1)
    stamp = Path(first + ".bin").stat().st_mtime_ns
    capfd.readouterr()
    assert prepare(str(source), tokenizer, cache, workers=2) == first
    assert Path(first + ".bin").stat().st_mtime_ns == stamp and "up to date" in capfd.readouterr().err
    preprocess.main(["--input", first, "--tokenizer-name-or-path", tokenizer])
    assert capfd.readouterr().out == first + "\n"
    assert prepare(str(source), tokenizer, cache, append_eod=False) != first
    write_jsonl(source, some_texts(21))
    assert prepare(str(source), tokenizer, cache) != first


def test_a_dry_run_checks_and_converts_nothing(tokenizer: str, tmp_path: Path, capfd: Any) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", some_texts(20))
    options = Options(str(source), tokenizer, str(tmp_path / "out"))
    assert preview(options) == []
    assert "would convert 1 files" in capfd.readouterr().err and not list(tmp_path.glob("*out*"))
    message = r"no usable record.*field 'txt' is missing; fields read: 'text'\. .* --json-keys \(JSON_KEYS\)"
    with pytest.raises(UserError, match=message):
        preview(replace(options, keys=("txt",)))
    words = ["--input", str(source), "--tokenizer-name-or-path", tokenizer, "--output-prefix", str(tmp_path / "out")]
    preprocess.main(words)
    done = capfd.readouterr().out
    preprocess.main([*words, "--dry-run"])
    assert capfd.readouterr().out == done
    with pytest.raises(UserError, match="no such file"):
        preprocess.main([*words, "--dry-run", "--input", str(tmp_path / "typo.jsonl")])


def test_a_damaged_result_is_made_again(tokenizer: str, tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", some_texts(20))
    prefix = prepare(str(source), tokenizer, str(tmp_path / "cache"))
    whole = files_of(prefix)
    Path(prefix + ".bin").write_bytes(whole[0][:-4])
    assert prepare(str(source), tokenizer, str(tmp_path / "cache")) == prefix
    assert files_of(prefix) == whole
    assert {p.name.split(".", 1)[1] for p in (tmp_path / "cache").iterdir()} == {"bin", "idx", "meta.json"}


def test_a_stricter_reject_rate_is_not_met_by_an_earlier_result(tokenizer: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "good"}\noops\n')
    options = Options(str(tmp_path / "a.jsonl"), tokenizer, str(tmp_path / "out"), max_reject_rate=0.5)
    [prefix] = convert(options)
    with pytest.raises(UserError, match="cannot be used"):
        convert(replace(options, max_reject_rate=0.1))
    assert check_dataset(prefix) == []


def test_a_prefix_without_its_key_is_completed_in_the_error(tokenizer: str, tmp_path: Path) -> None:
    convert(Options(str(write_jsonl(tmp_path / "a.jsonl", ["x"])), tokenizer, str(tmp_path / "out")))
    with pytest.raises(UserError, match=r"did you mean .*out_text_document"):
        quick_check(tmp_path / "out")


def test_indexed_data_of_another_tokenizer_is_refused(tokenizer: str, tmp_path: Path) -> None:
    prefix = prepare(str(write_jsonl(tmp_path / "a.jsonl", some_texts(20))), tokenizer, str(tmp_path / "cache"))
    shutil.copytree(tokenizer, tmp_path / "tk")
    content = json.loads((tmp_path / "tk" / "tokenizer.json").read_text())
    content["model"]["merges"].pop()
    (tmp_path / "tk" / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="tokenizer mismatch"):
        preprocess.main(["--input", prefix, "--tokenizer-name-or-path", str(tmp_path / "tk")])
    with pytest.raises(UserError, match="tokenizer mismatch"):
        quick_check(prefix, tokenizer_fingerprint(tmp_path / "tk"))
    assert any("tokenizer mismatch" in p for p in check_dataset(prefix, tokenizer_info(tmp_path / "tk")))
    quick_check(prefix, tokenizer_fingerprint(tokenizer))


# ------------------------------------------------------------------ checking


def test_a_whole_dataset_passes_the_check(tokenizer: str, tmp_path: Path, capsys: Any) -> None:
    prefix = prepare(str(write_jsonl(tmp_path / "a.jsonl", some_texts(20))), tokenizer, str(tmp_path / "cache"))
    assert check_dataset(prefix) == check_dataset(prefix, tokenizer_info(tokenizer)) == []
    preprocess.main(["--check", prefix])
    assert "documents            20" in capsys.readouterr().out


@pytest.mark.parametrize(
    "damage", ["bin cut", "bin longer", "bin gone", "idx cut", "idx gone", "bit", "pointer", "documents"]
)
def test_the_check_finds_every_damage(damage: str, tokenizer: str, tmp_path: Path) -> None:
    prefix = prepare(str(write_jsonl(tmp_path / "a.jsonl", some_texts(20))), tokenizer, str(tmp_path / "cache"))
    data, index = files_of(prefix)
    kind, _, what = damage.partition(" ")
    changed = bytearray(data if kind == "bin" else index)
    path = Path(prefix + (".bin" if kind in ("bin", "bit") else ".idx"))
    if what == "gone":
        path.unlink()
    elif what in ("cut", "longer"):
        path.write_bytes(changed[:-4] if what == "cut" else bytes(changed) + b"\0\0\0\0")
    elif damage == "bit":
        path.write_bytes(bytes([data[0] ^ 1]) + data[1:])
    else:
        position = 34 + 20 * 4 + 8 * 3 if damage == "pointer" else len(index) - 8 * 5
        changed[position] ^= 1
        path.write_bytes(changed)
    assert check_dataset(prefix)
    if what or damage == "idx gone":
        with pytest.raises(UserError):
            quick_check(prefix)


def test_the_check_finds_ids_outside_of_the_vocabulary(tokenizer: str, tmp_path: Path) -> None:
    with IndexedWriter(tmp_path / "x") as writer:
        writer.add(np.array([1, 5, 320], np.uint32), np.array([3]))
    assert check_dataset(tmp_path / "x") == []  # nothing is recorded to compare with
    assert "token 2 is 320" in check_dataset(tmp_path / "x", tokenizer_info(tokenizer))[0]
    quick_check(tmp_path / "x", vocab_size=321)
    with pytest.raises(UserError, match="token 2 is 320"):
        quick_check(tmp_path / "x", vocab_size=320)


# ------------------------------------------------------------------ what users get wrong


def run_cli(*arguments: str) -> None:
    preprocess.main(list(arguments))


def test_wrong_input_is_named(tokenizer: str, tmp_path: Path) -> None:
    good = write_jsonl(tmp_path / "good.jsonl", ["x"])
    (tmp_path / "folder").mkdir()
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "model.safetensors").touch()
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(b'{"text": "a"}\n' * 1000)[:-20])
    (tmp_path / "broken.json").write_text('[{"text": "a"}, {"text": ')
    pyarrow.parquet.write_table(pyarrow.table({"content": ["a"]}), tmp_path / "other.parquet")
    (tmp_path / "fake.parquet").write_text("not parquet")
    as_zstd(tmp_path / "whole.jsonl.zst", some_texts(500))
    (tmp_path / "cut.jsonl.zst").write_bytes((tmp_path / "whole.jsonl.zst").read_bytes()[:-100])
    expected = {
        "nowhere.jsonl": "no such file",
        "*.nothing": "no such file",
        "folder": "no file to read",
        "empty.jsonl": r"empty\.jsonl: it has no records",
        "model.safetensors": "unknown kind of file",
        "cut.jsonl.gz": "truncated or damaged",
        "cut.jsonl.zst": "truncated or damaged",
        "broken.json": "malformed JSON",
        "other.parquet": "no column 'text'; it has content",
        "fake.parquet": "truncated or damaged",
        f"good.jsonl,{good}": "given twice",
    }
    for name, message in expected.items():
        with pytest.raises(UserError, match=message):
            convert(Options(f"{tmp_path}/{name}", tokenizer, str(tmp_path / "out")))
        assert not list(tmp_path.glob("out_*")), name
    empty = Options(str(tmp_path / "empty.jsonl"), tokenizer, str(tmp_path / "out"), seq_length=64)
    for run in (convert, preview):  # of conversations too, whatever their datasets are called
        with pytest.raises(UserError, match="it has no records"):
            run(replace(empty, handler="MiniMindInstructionHandler"))


def test_wrong_options_are_named(tokenizer: str, tmp_path: Path) -> None:
    source = str(write_jsonl(tmp_path / "a.jsonl", ["x"]))
    base = ["--input", source, "--tokenizer-name-or-path", tokenizer, "--output-prefix", str(tmp_path / "out")]
    expected = {
        ("--handler-name", "AlpacaStyleInstructionHandlr"): "this version knows GeneralPretrainHandler, .*MiniMind",
        ("--tokenizer-type", "GPT2BPETokenizer"): "expected PretrainedFromHF",
        ("--apend-eod",): "unknown flag --apend-eod; did you mean --append-eod",
        ("--pack",): "for conversations",
        ("--split-sentences",): "not implemented here",
        ("--tokenizer-name-or-path", str(tmp_path)): r"no tokenizer\.json",
        ("--workers", "0"): "--workers: found 0, expected 1",
        ("--json-keys", "text", "text"): "given twice",
        ("--workers", "many"): "invalid int value",
        ("--map-keys", "{bad"): "argument --map-keys: found '{bad', which is not valid JSON",
        ("--enable-thinking", "maybe"): "argument --enable-thinking: found 'maybe', expected true, false, none",
    }
    for arguments, message in expected.items():
        with pytest.raises(UserError, match=message):
            run_cli(*base, *arguments)
    with pytest.raises(UserError, match="--input is missing"):
        run_cli("--output-prefix", "x")
    with pytest.raises(UserError, match="--output-prefix is missing"):
        run_cli(*base[:4])


def test_the_command_prints_the_prefix_and_nothing_else(tokenizer: str, tmp_path: Path, capsys: Any) -> None:
    source = str(write_jsonl(tmp_path / "a.jsonl", some_texts(30)))
    base = ["--input", source, "--tokenizer-name-or-path", tokenizer, "--handler-name", "GeneralPretrainHandler"]
    run_cli(*base, "--output-prefix", str(tmp_path / "x" / "out"), "--append-eod", "--streaming", "--log-interval", "7")
    captured = capsys.readouterr()
    prefix = captured.out.strip()
    assert prefix == str(tmp_path / "x" / "out_text_document")
    assert "no effect here: --streaming, --log-interval" in captured.err
    run_cli("--input", prefix, "--tokenizer-name-or-path", tokenizer)
    assert capsys.readouterr().out.strip() == prefix


def test_documents_that_are_too_long_are_counted(tokenizer: str, tmp_path: Path) -> None:
    texts = ["a", "b " * 100, "c"]
    source = write_jsonl(tmp_path / "a.jsonl", texts)
    [prefix] = convert(Options(str(source), tokenizer, str(tmp_path / "out"), seq_length=50, append_eod=True))
    meta = read_meta(prefix)
    assert meta is not None and (meta.too_long, meta.written.documents) == (1, 2)
    assert all(ids[-1] == 2 for ids in documents(prefix))
