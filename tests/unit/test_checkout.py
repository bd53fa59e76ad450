"""The tests pass in a checkout in which the README was followed: they depend on nothing that a user made there."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from helpers.engine import ROOT, Corpus

# Tests of what reads paths such as data/quickstart/tokenizer, by the files that they are in.
PART = ("tests/unit/test_rl_config.py", "-k", "tiny and (fit_for_every_target or native_parser)")


def made(checkout: Path) -> dict[str, bytes]:
    """What is in data/ and outputs/, by path."""
    folders = (checkout / "data", checkout / "outputs")
    return {str(path): path.read_bytes() for folder in folders for path in folder.rglob("*") if path.is_file()}


def test_part_of_the_suite_passes_where_the_readme_was_followed(corpus: Corpus, tmp_path: Path) -> None:
    checkout = tmp_path / "kit"
    for name in ("configs", "converters", "minimind_mcore", "models", "preprocess", "tests", "pyproject.toml"):
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, checkout / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, checkout / name)
    for folder in ("data", "data/quickstart"):
        shutil.copytree(corpus.tokenizer, checkout / folder / "tokenizer")
        (checkout / folder / "sample.jsonl").write_text('{"text": "1+1=2"}\n')
        for suffix in (".bin", ".idx"):
            shutil.copy(
                f"{corpus.prefix}{suffix}", checkout / folder / f"grpo_minimind_math_packed_labels_document{suffix}"
            )
    saved = checkout / "outputs/grpo_minimind_tiny/checkpoints/iter_0000100/mp_rank_00"
    saved.mkdir(parents=True)
    (saved / "model_optim_rng.pt").write_bytes(b"no archive")
    before = made(checkout)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *PART],
        cwd=checkout, env=os.environ | {"PYTHONPATH": str(checkout)}, capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-4000:] + done.stderr[-2000:]
    assert made(checkout) == before
