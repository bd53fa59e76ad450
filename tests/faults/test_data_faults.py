"""Data that changed after its conversion is refused, never trained on."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.engine import Corpus, Run, Server

from minimind_mcore.errors import UserError
from minimind_mcore.models.presets import PRESETS
from minimind_mcore.preprocess import check as checks
from minimind_mcore.preprocess import main as preprocess
from minimind_mcore.preprocess.indexed import HEADER, IndexedWriter
from minimind_mcore.storage import record_files

CONFIG = PRESETS["minimind2_small_tiny"]
SUFFIXES = (".bin", ".idx", ".meta.json")


@pytest.fixture(scope="module")
def converted(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small dataset that preprocess_data.py has converted; its input is beside it."""
    folder = tmp_path_factory.mktemp("converted")
    words = np.random.default_rng(3).integers(97, 105, size=(300, 200), dtype=np.uint8)
    lines = [json.dumps({"text": bytes(row).decode()}) for row in words]
    (folder / "a.jsonl").write_text("\n".join(lines))
    convert(folder / "a.jsonl", folder / "a", corpus)
    return folder / "a_text_document"


def convert(source: Path, prefix: Path, corpus: Corpus) -> None:
    flags = ["--input", source, "--output-prefix", prefix, "--tokenizer-name-or-path", corpus.tokenizer]
    preprocess.main([str(flag) for flag in [*flags, "--append-eod", "--workers", "1"]])


@pytest.fixture
def data(converted: Path, tmp_path: Path) -> Path:
    """A copy of the dataset that a test may damage."""
    for suffix in SUFFIXES:
        shutil.copy(f"{converted}{suffix}", tmp_path / f"data{suffix}")
    return tmp_path / "data"


def flip_a_token(data: Path) -> str:
    path = Path(f"{data}.bin")
    content = bytearray(path.read_bytes())
    content[len(content) // 2 & ~3] ^= 1  # another token of the vocabulary
    path.write_bytes(content)
    return f"{path}: bytes 0 to"


def swap_two_lengths(data: Path) -> str:
    """The index remains consistent: only its digest tells."""
    path = Path(f"{data}.idx")
    content = bytearray(path.read_bytes())
    count = HEADER.unpack_from(content)[3]
    lengths = np.frombuffer(content, np.int32, count, HEADER.size)
    pointers = np.frombuffer(content, np.int64, count, HEADER.size + 4 * count)
    at = int(np.flatnonzero(np.diff(lengths))[0])
    first, second = int(lengths[at]), int(lengths[at + 1])
    lengths[at], lengths[at + 1] = second, first
    pointers[at + 1] = pointers[at] + 4 * second
    path.write_bytes(content)
    return f"{path}: content differs from its recorded SHA-256"


def train(server: Server, corpus: Corpus, data: Path, folder: Path, **flags: Any) -> Run:
    argv = corpus.flags(CONFIG, data_path=data, data_cache_path=folder / "cache", train_iters=2, **flags)
    return server.run(argv, folder / "run", check=False)


@pytest.mark.parametrize("dry", [False, True], ids=["run", "dry run"])
@pytest.mark.parametrize("damage", [flip_a_token, swap_two_lengths])
def test_a_dataset_damaged_after_its_conversion_is_refused(
    server: Server, corpus: Corpus, data: Path, tmp_path: Path, damage: Callable[[Path], str], dry: bool
) -> None:
    message = damage(data)
    run = train(server, corpus, data, tmp_path, dry_run=dry)
    assert run.codes == [1] and message in run.output and "Traceback" not in run.output, run.output


def test_a_whole_dataset_trains(server: Server, corpus: Corpus, data: Path, tmp_path: Path) -> None:
    run = train(server, corpus, data, tmp_path, verify_data=True)
    assert run.codes == [0] and len(run.rows) == 2, run.output
    # so does one whose record is of a version that recorded no blocks
    meta = Path(f"{data}.meta.json")
    record = json.loads(meta.read_text())
    record["written"].pop("bin_blocks")
    meta.write_text(json.dumps(record))
    assert train(server, corpus, data, tmp_path).codes == [0]
    flip_a_token(data)
    run = train(server, corpus, data, tmp_path)
    assert run.codes == [1] and "data.bin: content differs from its recorded SHA-256" in run.output


def test_the_same_conversion_again_repairs_a_damaged_dataset(corpus: Corpus, converted: Path, tmp_path: Path) -> None:
    source = tmp_path / "a.jsonl"
    shutil.copy(converted.with_name("a.jsonl"), source)
    convert(source, tmp_path / "a", corpus)
    prefix = tmp_path / "a_text_document"
    flip_a_token(prefix)
    convert(source, tmp_path / "a", corpus)
    assert Path(f"{prefix}.bin").read_bytes() == Path(f"{converted}.bin").read_bytes()


def write(prefix: Path, dtype: str, pointers: list[int], lengths: list[int], tokens: int) -> None:
    """A pair of files as another program may write it."""
    codes = {"int32": 4, "float32": 7}
    header = HEADER.pack(b"MMIDIDX\x00\x00", 1, codes[dtype], len(lengths), len(lengths) + 1)
    parts = [np.array(lengths, np.int32), np.array(pointers, np.int64), np.arange(len(lengths) + 1, dtype=np.int64)]
    Path(f"{prefix}.idx").write_bytes(header + b"".join(part.tobytes() for part in parts))
    Path(f"{prefix}.bin").write_bytes(np.ones(tokens, dtype).tobytes())


@pytest.mark.parametrize(
    ("pointers", "dtype", "message"),
    [
        ([0, 400, 600], "int32", "the pointer of sequence 2 is not where it begins"),  # overlaps the one before
        ([0, 800, 400], "int32", "the pointer of sequence 1 is not where it begins"),  # decreases
        ([0, 400, 800], "float32", "dtype float32, expected integers"),
        ([], "int32", "found 0 sequences, expected 1 or more"),
    ],
    ids=["overlapping", "decreasing", "float", "empty"],
)
def test_an_index_that_makes_no_sense_is_refused(
    server: Server, corpus: Corpus, tmp_path: Path, pointers: list[int], dtype: str, message: str
) -> None:
    write(tmp_path / "x", dtype, pointers, [100] * len(pointers), 100 * len(pointers))
    run = train(server, corpus, tmp_path / "x", tmp_path, dry_run=True)
    assert run.codes == [1] and message in run.output and "Traceback" not in run.output, run.output
    with pytest.raises(UserError, match=message):
        preprocess.main(["--check", str(tmp_path / "x")])


def test_a_start_reads_a_bounded_part_of_a_large_file(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from minimind_mcore.preprocess.meta import read_meta

    lines = "\n".join(json.dumps({"text": "abcd " * 20000}) for _ in range(4))
    (tmp_path / "a.jsonl").write_text(lines)
    monkeypatch.setattr("minimind_mcore.preprocess.indexed.BLOCK_BYTES", 1 << 12)
    monkeypatch.setattr(checks, "BLOCK_BYTES", 1 << 12)
    convert(tmp_path / "a.jsonl", tmp_path / "a", corpus)
    prefix = tmp_path / "a_text_document"
    meta = read_meta(prefix)
    assert meta is not None and len(meta.written.bin_blocks) // 8 == -(-meta.written.bin_bytes // 4096) > 70
    read: list[int] = []

    class Counting:
        @staticmethod
        def crc32(data: bytes) -> int:
            read.append(len(data))
            return zlib.crc32(data)

    monkeypatch.setattr(checks, "zlib", Counting)
    checks.quick_check(prefix)
    assert len(read) == 64 and sum(read) <= 64 * 4096
    read.clear()
    flip_a_token(prefix)
    with pytest.raises(UserError, match="recorded CRC-32"):
        checks.quick_check(prefix, everything=True)
    # the processes of a host share the blocks
    found = 0
    for rank in range(2):
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
        try:
            checks.quick_check(prefix, everything=True)
        except UserError:
            found += 1
    assert found == 1


def test_the_recorded_blocks_are_those_of_the_file(tmp_path: Path) -> None:
    tokens = np.arange(700_000, dtype=np.int32)  # 2.7 blocks
    with IndexedWriter(tmp_path / "x") as writer:
        for part in np.array_split(tokens, 5):
            writer.add(part, np.array([len(part)]))
    content = Path(tmp_path / "x.bin").read_bytes()
    blocks = [content[start : start + (1 << 20)] for start in range(0, len(content), 1 << 20)]
    assert writer.written.bin_blocks == "".join(f"{zlib.crc32(block):08x}" for block in blocks)


# Cached sample orders of megatron-core


def truncate_shuffle(cache: Path) -> None:
    for file in cache.glob("*-shuffle_index.npy"):
        file.write_bytes(file.read_bytes()[:-40])


def reverse_shuffle(cache: Path) -> None:
    """Another order of the same samples, in a file that is well-formed."""
    for file in cache.glob("*-GPTDataset-train-shuffle_index.npy"):
        np.save(file, np.load(file)[::-1])


def reverse_blend(cache: Path) -> None:
    files = list(cache.glob("*-BlendedDataset-train-dataset_index.npy"))
    assert files
    for file in files:
        np.save(file, 1 - np.load(file))


def half_written(cache: Path) -> None:
    """A cache whose writer was killed: one file is cut, and the last ones are missing."""
    for file in cache.glob("*-digests.json"):
        file.unlink()
    truncate_shuffle(cache)


def damaged_record(cache: Path) -> None:
    for file in cache.glob("*-digests.json"):
        file.write_bytes(b"\xff{")


class Hostile:
    """Makes a directory where it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.folder),)


def pickled(cache: Path) -> None:
    """A file that numpy.load unpickles, with a record that has its digest."""
    for file in cache.glob("*-GPTDataset-train-shuffle_index.npy"):
        file.write_bytes(pickle.dumps(Hostile(cache.parent / "code has run")))
        record = file.with_name(file.name.replace("shuffle_index.npy", "digests.json"))
        record_files(record, [cache / name for name in json.loads(record.read_text())["files"]])


DAMAGES = [truncate_shuffle, reverse_shuffle, reverse_blend, half_written, damaged_record, pickled]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_cache_is_built_again_and_changes_no_loss(
    server: Server, corpus: Corpus, tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    blend = damage is reverse_blend
    shutil.copytree(corpus.prefix.parent, tmp_path / "data", ignore=shutil.ignore_patterns("cache"))
    prefix = tmp_path / "data" / corpus.prefix.name
    argv = corpus.flags(CONFIG, data_path=prefix, data_cache_path=tmp_path / "cache", train_iters=3)
    if blend:
        at = argv.index(str(prefix))
        argv[at : at + 1] = ["0.5", str(prefix), "0.5", str(corpus.prefix)]
    expected = server.run(argv, tmp_path / "first", 2).column()
    names = {file.name for file in (tmp_path / "cache").iterdir()}
    damage(tmp_path / "cache")
    run = server.run(argv, tmp_path / "second", 2, check=False)
    assert not (tmp_path / "code has run").exists()
    assert run.codes == [0, 0] and run.column() == expected, run.output
    assert damage is half_written or "the cached sample order is damaged and is rebuilt" in run.output
    assert {file.name for file in (tmp_path / "cache").iterdir()} == names
    run = server.run(argv, tmp_path / "third", 2)
    assert run.column() == expected and "is rebuilt" not in run.output


def test_a_cache_that_cannot_be_written_is_one_sentence(server: Server, corpus: Corpus, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    argv = corpus.flags(CONFIG, data_cache_path=tmp_path / "file" / "cache", train_iters=1)
    run = server.run(argv, tmp_path / "run", check=False)
    assert run.codes == [1] and "Traceback" not in run.output, run.output
    message = f"error: {tmp_path / 'file' / 'cache'}: cannot be written (Not a directory); give a writable directory"
    assert message in run.output, run.output


@pytest.mark.parametrize("damage", [flip_a_token, swap_two_lengths])
def test_damaged_data_is_refused_before_mindspeed_llm_starts(data: Path, damage: Callable[[Path], str]) -> None:
    from minimind_mcore.mindspeed.flags import complete

    flags = ["--attention-dropout", "0.0", "--hidden-dropout", "0.0", "--split", "100,0,0", "--data-path", str(data)]
    message = damage(data)
    with pytest.raises(UserError) as caught:
        complete("pretrain_gpt.py", [*CONFIG.megatron_flags(), *flags, "--verify-data"])
    assert message in str(caught.value)
