"""Damaged weights, datasets and tokenizers, for the fuzz."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import random
import struct
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

from helpers.fuzz import NOT_JSON, Case, flipped, write
from helpers.weight_tables import hf_to_mcore
from helpers.weights_on_disk import SMALL, state_dict, write_hf
from minimind_mcore.checkpoint.opening import open_source
from minimind_mcore.models import weights
from minimind_mcore.preprocess import main as preprocess
from minimind_mcore.preprocess.check import quick_check
from minimind_mcore.preprocess.indexed import IndexedWriter, bin_path, idx_path
from minimind_mcore.preprocess.tokenize import load_encoder, tokenizer_info

# ------------------------------------------------------------------------------------------------------- weights


def open_all(path: Path) -> None:
    """Open a model and read all its tensors, as a conversion does."""
    source = open_source(path)
    for check in source.checks:
        check()
    for tensor in source.tensors.values():
        tensor.read()


def safetensors_cases(rng: random.Random, folder: Path) -> Iterator[Case]:
    """A safetensors file, its index, or the config beside it, that do not fit together."""
    config = SMALL["minimind3_moe"]
    model = write_hf(folder / "model", config, state_dict(config, "hf"))
    file = model / "model.safetensors"
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    names = [name for name in header if name != "__metadata__"]

    def read(content: bytes) -> None:
        file.write_bytes(content)
        open_all(model)

    def case(name: str, content: bytes) -> Case:
        return Case("safetensors", name, lambda: read(content), str(model))

    for _ in range(12):
        cut = rng.randrange(len(data))
        yield case(f"cut at {cut}", data[:cut])
    for _ in range(4):
        yield case(f"length {(size := rng.choice([0, 1, 2**63, 2**64 - 1, length + 1, length - 1]))}",
                   size.to_bytes(8, "little") + data[8:])  # fmt: skip
    yield case("longer", data + b"more")
    for _ in range(15):
        at = 8 + data[8 : 8 + length].index(b'"' + rng.choice(names).encode()) + rng.randrange(1, 20)
        yield case(f"bit of a name at {at}", flipped(data, at, rng))
    damage: dict[str, list[Any]] = {
        "dtype": ["I32", "F8_E4M3", "F16", "X", 3],
        "shape": [[1], [-1], "x", [2**62, 4]],
        "data_offsets": [[0, 1], [4, 0], [2**70, 2**71], "x"],
    }
    for name in rng.sample(names, 8):
        for key, wrong in damage.items():
            value = rng.choice(wrong)
            changed = copy.deepcopy(header)
            changed[name][key] = value
            text = json.dumps(changed).encode()
            yield case(f"{name} {key} = {value}", len(text).to_bytes(8, "little") + text + data[8 + length :])
    for name in rng.sample(names, 5):
        state = {key: tensor for key, tensor in state_dict(config, "hf").items() if key != name}
        if config.tie_embeddings and name in ("lm_head.weight", "model.embed_tokens.weight"):
            continue
        yield case(f"without {name}", _saved(folder, state))
        yield case(f"another shape of {name}", _saved(folder, state | {name: torch.zeros(3, 5)}))
        yield case(f"more than {name}", _saved(folder, state_dict(config, "hf") | {f"{name}.more": torch.zeros(3)}))
    yield from _index_cases(rng, folder, data, names)


def _saved(folder: Path, state: dict[str, torch.Tensor]) -> bytes:
    save_file({name: tensor.contiguous().clone() for name, tensor in state.items()}, folder / "tmp.safetensors")
    return (folder / "tmp.safetensors").read_bytes()


def _index_cases(rng: random.Random, folder: Path, data: bytes, names: list[str]) -> Iterator[Case]:
    config = SMALL["minimind3_moe"]
    model = write_hf(folder / "indexed", config, state_dict(config, "hf"))
    (model / "model.safetensors").rename(model / "model-00001-of-00001.safetensors")
    index = model / "model.safetensors.index.json"
    good = {"weight_map": dict.fromkeys(names, "model-00001-of-00001.safetensors")}

    def case(name: str, content: Any) -> Case:
        def read() -> None:
            write(index, content)
            open_all(model)

        return Case("safetensors", f"index: {name}", read, str(model))

    for name, text in NOT_JSON.items():
        yield case(name, text)
    for value in ("x", [], 3, None, {"a": 1}, {"a": None}, {"a": ["b"]}, {}):
        yield case(f"weight_map {value}", {"weight_map": value})
    for value in ("none.safetensors", "../model/model.safetensors", "/etc/passwd", "", ".", "a\0b", 3, "x" * 5000):
        yield case(f"file {str(value)[:30]!r}", {"weight_map": good["weight_map"] | {rng.choice(names): value}})


def pth_cases(rng: random.Random, folder: Path) -> Iterator[Case]:
    """A .pth file that was cut, changed, or holds something else."""
    config = SMALL["minimind3"]
    file = folder / "full_sft_32.pth"
    state = weights.mcore_to_hf(hf_to_mcore(state_dict(config, "hf"), config), config, "native")
    torch.save(state, file)
    data = file.read_bytes()

    def case(name: str, content: bytes) -> Case:
        def read() -> None:
            file.write_bytes(content)
            open_all(file)

        return Case("pth", name, read, str(file))

    for _ in range(20):
        cut = rng.randrange(len(data))
        yield case(f"cut at {cut}", data[:cut])
    with zipfile.ZipFile(file) as archive:
        infos = archive.infolist()
        directory = archive.start_dir
    places = []
    for info in infos:
        name, extra = struct.unpack("<HH", data[info.header_offset + 26 : info.header_offset + 30])
        start = info.header_offset + 30 + name + extra
        if info.filename.endswith("data.pkl"):
            places += [("the pickle", start + rng.randrange(info.file_size)) for _ in range(30)]
        elif "/data/" in info.filename:
            places.append(("a tensor", start + rng.randrange(info.file_size)))
    places = [
        *[p for p in places if p[0] == "the pickle"],
        *rng.sample([p for p in places if p[0] != "the pickle"], 20),
    ]
    for what, at in places:
        yield case(f"bit of {what} at {at}", flipped(data, at, rng))
    for _ in range(10):
        at = directory + 16 + rng.randrange(12)  # checksum and sizes of a record; its date may be any
        yield case(f"bit of the directory at {at}", flipped(data, at, rng))
    others: dict[str, Any] = {
        "a list": [1, 2],
        "a tensor": torch.zeros(3),
        "text": "hello",
        "numbers": {"a": 1},
        "no names": {1: torch.zeros(3), 2: torch.zeros(3)},
        "other names": {"a": torch.zeros(3)},
        "integers": {name: tensor.to(torch.int32) for name, tensor in state.items()},
        "nested": {"model": {"model": state}},
        "not contiguous": {name: torch.zeros(5, 7).t() for name in state},
        **{f"without {name}": {n: t for n, t in state.items() if n != name} for name in rng.sample(sorted(state), 6)
           if "lm_head" not in name and "embed" not in name},
        **{f"another shape of {name}": state | {name: torch.zeros(3)} for name in rng.sample(sorted(state), 6)},
        **{f"scalar {name}": state | {name: torch.tensor(1.0)} for name in rng.sample(sorted(state), 3)},
    }  # fmt: skip
    for name, content in others.items():
        torch.save(content, folder / "other.pth")
        yield case(name, (folder / "other.pth").read_bytes())
    for name, text in (("empty", b""), ("text", b"hello " * 50), ("an old pickle", b"\x80\x02]q\x00.")):
        yield case(name, text)


# ---------------------------------------------------------------------------------------------------------- data


def _tokenizer(folder: Path) -> dict[str, Any]:
    """A small tokenizer's files; returns the content of its tokenizer.json."""
    folder.mkdir(parents=True, exist_ok=True)
    letters = {chr(97 + i): i + 3 for i in range(26)}
    made = Tokenizer(models.BPE(vocab=letters | {"ab": 29, "cd": 30}, merges=[("a", "b"), ("c", "d")]))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.add_special_tokens([AddedToken(text, special=True) for text in ("<pad>", "<s>", "</s>")])
    made.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"bos_token": "<s>", "eos_token": "</s>"}), encoding="utf-8"
    )
    found: dict[str, Any] = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    return found


def idx_cases(rng: random.Random, folder: Path) -> Iterator[Case]:
    """A dataset whose files were changed, with the record of its conversion and without."""
    _tokenizer(folder / "tokenizer")
    (folder / "text.jsonl").write_text(
        "".join(f'{{"text": "ab cd {"xyz"[i % 3]}"}}\n' for i in range(40)), encoding="utf-8"
    )
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        preprocess.main(["--input", str(folder / "text.jsonl"), "--output-prefix", str(folder / "recorded"),
                         "--tokenizer-name-or-path", str(folder / "tokenizer"), "--append-eod"])  # fmt: skip
    with IndexedWriter(folder / "foreign_text_document") as writer:
        writer.add(np.arange(90, dtype=np.int32) % 30, np.full(30, 3))
    meta = folder / "recorded_text_document.meta.json"
    kept = {file: file.read_bytes() for file in folder.glob("*_text_document*")}

    def case(name: str, prefix: str, changes: dict[Path, bytes | None]) -> Case:
        def read() -> None:
            for file, content in (kept | changes).items():
                file.unlink(missing_ok=True)
                if content is not None:
                    file.write_bytes(content)
            quick_check(folder / prefix, vocab_size=32)

        return Case("idx", f"{prefix}: {name}", read, str(folder / prefix))

    for prefix in ("recorded_text_document", "foreign_text_document"):
        idx, tokens = idx_path(folder / prefix), bin_path(folder / prefix)
        data = kept[idx]
        count = int.from_bytes(data[18:26], "little")
        for _ in range(12):
            yield case(f"cut at {(cut := rng.randrange(len(data)))}", prefix, {idx: data[:cut]})
        # Without a record the document indices could be others, as long as they grow.
        end = len(data) if prefix.startswith("recorded") else 34 + 12 * count
        for _ in range(30):
            yield case(f"bit at {(at := rng.randrange(end))}", prefix, {idx: flipped(data, at, rng)})
        for what, at in (("sequences", 18), ("documents", 26)):
            for number in (0, 1, 2**62, 2**64 - 1):
                changed = data[:at] + number.to_bytes(8, "little") + data[at + 8 :]
                yield case(f"{number} {what}", prefix, {idx: changed})
        for code in (0, 3, 6, 7, 8, 9, 255):
            yield case(f"dtype code {code}", prefix, {idx: data[:17] + bytes([code]) + data[18:]})
        yield case("empty", prefix, {idx: b""})
        yield case("no .bin", prefix, {tokens: None})
        yield case("no .idx", prefix, {idx: None})
        yield case("empty .bin", prefix, {tokens: b""})
        yield case("longer .bin", prefix, {tokens: kept[tokens] + b"1234"})
        yield case("shorter .bin", prefix, {tokens: kept[tokens][:-4]})
        yield case("ids", prefix, {tokens: b"\x00\x00\x00\x7f" + kept[tokens][4:]})
    tokens = bin_path(folder / "recorded_text_document")
    for _ in range(6):
        at = rng.randrange(len(kept[tokens]))
        yield case(f"bit of .bin at {at}", "recorded_text_document", {tokens: flipped(kept[tokens], at, rng)})
    record = json.loads(kept[meta])
    for name, text in NOT_JSON.items():
        yield case(f"record {name}", "recorded_text_document", {meta: text})
    for key in ("tokenizer", "written", "sources", "request"):
        for value in (3, "x", None, [], {"a": 1}):
            if key != "request" and not (key == "sources" and value == []):
                changed = json.dumps(record | {key: value}).encode()
                yield case(f"record {key} = {value}", "recorded_text_document", {meta: changed})
    for key in record["written"]:
        changed = json.dumps(record | {"written": record["written"] | {key: ["x"]}}).encode()
        yield case(f"record written.{key}", "recorded_text_document", {meta: changed})


def tokenizer_cases(rng: random.Random, folder: Path) -> Iterator[Case]:
    """A tokenizer.json or tokenizer_config.json that is damaged."""
    content = _tokenizer(folder / "t")
    kept = {file: file.read_bytes() for file in (folder / "t").iterdir()}

    def case(name: str, changed: Any, file: str = "tokenizer.json") -> Case:
        def read() -> None:
            for path, data in kept.items():
                path.write_bytes(data)
            write(folder / "t" / file, changed)
            tokenizer_info(folder / "t")
            load_encoder(folder / "t", "tokenizers").encode(["ab cd", "z"])

        return Case("tokenizer.json", f"{file}: {name}", read, str(folder / "t"))

    for name, text in NOT_JSON.items():
        yield case(name, text)
        yield case(name, text, "tokenizer_config.json")
        yield case(name, text, "special_tokens_map.json")
    whole = json.dumps(content).encode()
    for _ in range(10):
        yield case(f"cut at {(cut := rng.randrange(1, len(whole) - 1))}", whole[:cut])
    for key in ("model", "added_tokens"):
        for value in ("x", 3, [3], {"a": 1}, True):
            yield case(f"{key} = {value}", content | {key: value})
    for key in ("vocab", "merges", "type"):
        for value in ("x", 3, [3], {"a": "b"}, True, ["a b c"], ["q7 z"]):
            if not (key == "merges" and value in ([],)):
                yield case(f"model.{key} = {value}", content | {"model": content["model"] | {key: value}})
    for value in (-1, 2.5, "3", None, True, 4_000_000_000, 2**32, 10**30, [1], float("nan")):
        vocab = content["model"]["vocab"] | {rng.choice(["q", "ab", "new"]): value}
        yield case(f"id {value}", content | {"model": content["model"] | {"vocab": vocab}})
        added = [{**content["added_tokens"][0], "id": value}, *content["added_tokens"][1:]]
        yield case(f"added id {value}", content | {"added_tokens": added})
    yield case("one id twice", content | {"model": content["model"] | {"vocab": content["model"]["vocab"] | {"q": 3}}})
    for key in ("content", "special", "id", "normalized"):
        for value in (None, [3], {"a": 1}):
            added = [{**content["added_tokens"][0], key: value}, *content["added_tokens"][1:]]
            yield case(f"added {key} = {value}", content | {"added_tokens": added})
    for key in ("normalizer", "pre_tokenizer", "post_processor", "decoder"):
        for value in ("x", 3, {"type": "None"}, [{}]):
            yield case(f"{key} = {value}", content | {key: value})
