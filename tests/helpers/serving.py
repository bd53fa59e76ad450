"""Servers of small models with random weights, in this process or as a program, for tests."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx  # pyright: ignore[reportMissingImports]

from helpers.engine import ROOT
from helpers.weights_on_disk import state_dict, write_hf
from minimind_mcore.checkpoint.layout import ParallelLayout
from minimind_mcore.converters.conversion import Conversion
from minimind_mcore.inference.loading import open_both
from minimind_mcore.models.config import ModelConfig
from minimind_mcore.models.presets import PRESETS
from minimind_mcore.preprocess.tokenize import tokenizer_info
from minimind_mcore.serve.embedded import EmbeddedServer, listening
from minimind_mcore.serve.engines import ServerOptions


def shrunk(name: str, vocab_size: int) -> ModelConfig:
    """A preset with two layers, a small width and this vocabulary, but its own heads."""
    config = PRESETS[name]
    moe = config.moe
    if moe is not None:
        shared = {"shared_ffn_hidden_size": 64} if moe.shared_ffn_hidden_size else {}
        moe = type(moe)(**{**vars(moe), "ffn_hidden_size": 64, **shared})
    return config.replace(num_layers=2, hidden_size=64, ffn_hidden_size=64, vocab_size=vocab_size, moe=moe)


def write_served(folder: Path, config: ModelConfig, tokenizer: str | Path, **changes: Any) -> Path:
    """A directory of transformers with random weights and a tokenizer."""
    write_hf(folder, config, state_dict(config, "hf"), **changes)
    for file in Path(tokenizer).iterdir():
        shutil.copy(file, folder)
    return folder


def vocabulary(tokenizer: str | Path) -> int:
    """Size of a tokenizer's vocabulary."""
    return tokenizer_info(str(tokenizer)).vocab_size


@contextmanager
def embedded(model: Path, **options: Any) -> Iterator[tuple[str, EmbeddedServer]]:
    """The embedded server in a thread; gives its address and the server itself."""
    conversion = Conversion(load_dir=model, save_dir=Path(), save_type="hf", layout=ParallelLayout(), dtype="fp32")
    source, info = open_both(conversion, None)
    with listening("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
        server = EmbeddedServer(
            source, info, ServerOptions(**{"host": "127.0.0.1", "port": port, "name": "minimind"} | options)
        )
        thread = threading.Thread(target=lambda: asyncio.run(server.run(listener)), daemon=True)
        thread.start()
        address = f"http://127.0.0.1:{port}"
        try:
            wait_until_ready(address)
            yield address, server
        finally:
            server.stop()
            thread.join(60)
            assert not thread.is_alive()


def wait_until_ready(address: str, seconds: float = 180) -> None:
    """Wait until /health answers 200."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            if httpx.get(f"{address}/health", timeout=5).status_code == 200:
                return
        except httpx.HTTPError:
            pass
        time.sleep(0.05)
    raise TimeoutError(f"{address} did not become ready")


def program(*flags: str, **environment: str) -> subprocess.Popen[str]:
    """`minimind-mcore serve` as a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "minimind_mcore.cli", "serve", *flags],
        env={**os.environ, "PYTHONPATH": str(ROOT), "DEVICE": "cpu", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def until_serving(process: subprocess.Popen[str]) -> tuple[str, str]:
    """Read what a server prints until it is ready; return its address and that text."""
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith("serving"):
            return line.split()[1].removesuffix("/v1"), "".join(lines)
    raise AssertionError("".join(lines))
