"""Shared fixtures."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path

import engine
import numpy as np
import pytest


@pytest.fixture(params=["v3", "v2"])
def published_tokenizer(request: pytest.FixtureRequest) -> Path:
    """Directory of one of MiniMind's published tokenizers; skips where they are not given."""
    root = os.environ.get("MINIMIND_TOKENIZER_DIR")
    if not root:
        pytest.skip("MINIMIND_TOKENIZER_DIR is not set: MiniMind's published tokenizers are not shipped here")
    return Path(root) / request.param


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
