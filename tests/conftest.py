"""Shared fixtures."""

from __future__ import annotations

import itertools
import os
import random
import signal
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pytest
from helpers import engine, posttrain_oracle
from helpers.site import build

from minimind_mcore import log

# A shell starts programs in its background with SIGINT ignored, and they pass that on to what they start.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def own_directory(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run every test in a directory of its own: what a user made in the checkout (data/, outputs/) is none of it."""
    monkeypatch.chdir(tmp_path_factory.mktemp("cwd"))


@pytest.fixture(autouse=True)
def own_signal_handlers() -> Iterator[None]:
    """Give the next test the handlers that this one found: programs that run in the tests' process set their own."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


@pytest.fixture(autouse=True)
def console() -> None:
    """Print the kit's messages, also where a test calls a program's `main` itself."""
    log.setup()


@pytest.fixture(params=["v3", "v2"])
def published_tokenizer(request: pytest.FixtureRequest) -> Path:
    """Directory of one of MiniMind's published tokenizers; skips where they are not given."""
    root = os.environ.get("MINIMIND_TOKENIZER_DIR")
    if not root:
        pytest.skip("MINIMIND_TOKENIZER_DIR is not set: MiniMind's published tokenizers are not shipped here")
    return Path(root) / request.param


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    """minimind-3's published tokenizer where it is given, else one that the kit trained, with the same template."""
    from minimind_mcore.preprocess import train_tokenizer

    if root := os.environ.get("MINIMIND_TOKENIZER_DIR"):
        return str(Path(root) / "v3")
    folder = str(tmp_path_factory.mktemp("tokenizer") / "tk")
    train_tokenizer.save(train_tokenizer.train(iter(["assistant user system 你好 " * 9]), 310), folder)
    return folder


@pytest.fixture(scope="session")
def server() -> Iterator[engine.Server]:
    """Runs the training engine on the installed megatron-core."""
    server = engine.Server()
    yield server
    server.close()


@pytest.fixture(scope="session")
def server_012() -> Iterator[engine.Server]:
    """Runs the training engine on megatron-core 0.12.1, where MCORE_012_DIR names its directory."""
    directory = os.environ.get("MCORE_012_DIR")
    if not directory:
        pytest.skip("MCORE_012_DIR is not set: no megatron-core 0.12.1 to test against")
    server = engine.Server(directory)
    yield server
    server.close()


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> engine.Corpus:
    """A small tokenizer, and a dataset whose next token is partly predictable."""
    from minimind_mcore.preprocess import train_tokenizer
    from minimind_mcore.preprocess.indexed import IndexedWriter

    folder, size = tmp_path_factory.mktemp("corpus"), 512
    words = random.Random(1)
    texts = (" ".join("".join(words.choices("abcdefgh", k=4)) for _ in range(40)) for _ in range(200))
    train_tokenizer.save(train_tokenizer.train(texts, size), str(folder / "tokenizer"))
    numbers = np.random.default_rng(1)
    lengths = numbers.integers(20, 120, size=600)
    tokens = np.cumsum(numbers.integers(1, 6, size=lengths.sum())) % (size - 40) + 40
    with IndexedWriter(folder / "data_text_document") as writer:
        writer.add(tokens, lengths)
    return engine.Corpus(folder / "tokenizer", folder / "data_text_document", size)


@pytest.fixture(scope="session")
def dialogues(corpus: engine.Corpus, tmp_path_factory: pytest.TempPathFactory) -> engine.Corpus:
    """Conversations as the instruction and pairwise handlers write them: prefixes `chat`, `packed` and `pairs`."""
    from minimind_mcore.preprocess.indexed import IndexedWriter

    folder, numbers = tmp_path_factory.mktemp("dialogues"), np.random.default_rng(2)

    def answer(length: int, step: int) -> list[int]:
        return ((int(numbers.integers(400)) + step * np.arange(length)) % 460 + 40).tolist()

    def conversation(prompt: list[int], step: int) -> tuple[list[int], list[int]]:
        """Two turns; the labels are the answers."""
        first, more, second = answer(int(numbers.integers(3, 9)), step), answer(4, 3), answer(5, step)
        tokens = prompt + first + more + second
        return tokens, [-100] * len(prompt) + first + [-100] * len(more) + second

    def joined(rows: Iterable[list[int]]) -> list[int]:
        return list(itertools.chain.from_iterable(rows))

    chats = [conversation(answer(int(numbers.integers(2, 20)), 7), 1) for _ in range(24)]
    packs = [[chats[int(i)] for i in numbers.integers(24, size=int(numbers.integers(1, 4)))] for _ in range(24)]
    prompts = [answer(int(numbers.integers(2, 12)), 7) for _ in range(24)]
    sides = {"chosen": [conversation(p, 1) for p in prompts], "rejected": [conversation(p, 5) for p in prompts]}
    columns: dict[str, list[list[int]]] = {
        "chat_packed_input_ids": [tokens for tokens, _ in chats],
        "chat_packed_attention_mask": [[1] * len(tokens) for tokens, _ in chats],
        "chat_packed_labels": [labels for _, labels in chats],
        "packed_packed_input_ids": [joined(tokens for tokens, _ in pack) for pack in packs],
        "packed_packed_attention_mask": [joined([i + 1] * len(t) for i, (t, _) in enumerate(pack)) for pack in packs],
        "packed_packed_labels": [joined(labels for _, labels in pack) for pack in packs],
    }
    for side, samples in sides.items():
        columns[f"pairs_packed_{side}_input_ids"] = [tokens for tokens, _ in samples]
        columns[f"pairs_packed_{side}_labels"] = [labels for _, labels in samples]
    for name, rows in columns.items():
        with IndexedWriter(folder / f"{name}_document") as writer:
            writer.add(np.array(joined(rows)), np.array([len(row) for row in rows]))
    return engine.Corpus(corpus.tokenizer, folder / "chat", corpus.vocab_size)


@pytest.fixture(scope="session")
def start(server: engine.Server, corpus: engine.Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A `torch` checkpoint of the weights that runs of post-training start from."""
    from minimind_mcore.models.presets import PRESETS

    folder = tmp_path_factory.mktemp("start")
    still = {"train_iters": 1, "lr": 0.0, "min_lr": 0.0, "seq_length": 32, "ckpt_format": "torch"}
    flags = posttrain_oracle.FLAGS | still | {"save": folder / "checkpoints"}
    server.run(corpus.flags(PRESETS[posttrain_oracle.MODEL], **flags), folder / "run")
    return folder / "checkpoints"


@pytest.fixture(scope="session")
def built_site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The documentation site, built without a warning."""
    out = tmp_path_factory.mktemp("a site")
    done = build(out)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    return out
