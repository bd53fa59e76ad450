"""Prepare the data of a training: convert DATA_PATH once, or make the sample data."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from minimind_mcore.cli.settings import CLI, data_dir, env, flags, help_of, path, show
from minimind_mcore.errors import UserError
from minimind_mcore.paths import CONFIGS
from minimind_mcore.platform.processor import usable_cores
from minimind_mcore.preprocess.indexed import datasets_at

logger = logging.getLogger(__name__)

LOCK_SECONDS = 600  # time to wait for another process
PROBLEMS = "grpo_minimind_math"  # the reinforcement learning dataset that has sample data
MATH_SFT = "sample_math_sft.jsonl"  # dialogues for fine-tuning the model from which this dataset's training starts
HANDLERS = {"sft": "MiniMindInstructionHandler", "dpo": "MiniMindPairwiseHandler"}


def main(argv: Sequence[str]) -> None:
    """minimind-mcore data text|sft|dpo [flags]: convert data, and print the value of --data-path.

    minimind-mcore data NAME [flags]: convert the dataset that configs/datasets/NAME.yaml or the file NAME describes.
    For grpo_minimind_math the sample problems are made first.

    A second run with the same input and flags reuses the result. Settings of text, sft and dpo:
      DATA_PATH       files, directories or globs separated by commas, or a blend (default: sample data): .jsonl, .json,
                      .parquet, for text also .txt; .gz and .zst are read too
      TOKENIZER_PATH  directory with tokenizer.json, for sft and dpo also a chat template (default for sample data: a
                      tokenizer trained on the sample corpus)
      SEQ_LENGTH      maximum number of tokens of a sample (default: no limit); cut and skipped samples are counted
      PACK            sft: 1 packs samples, like --pack --neat-pack
      HANDLER_NAME    format of the data (default: GeneralPretrainHandler, MiniMindInstructionHandler or
                      MiniMindPairwiseHandler; docs/data.md lists all)
      PROMPT_TYPE MAP_KEYS   sft and dpo: like the flags (default: the chat template of the tokenizer)
      JSON_KEYS       text: fields to read (default: text)
      OUTPUT_PREFIX   prefix of the output (default: a name by content in DATA_DIR/cache)
      WORKERS         processes (default: the CPU cores)
    The flags are those of preprocess_data.py and override settings. --dry-run converts nothing.
    """
    help_of(argv, main.__doc__)
    kind, *rest = argv or [""]
    dry = "--dry-run" in rest
    if kind in ("text", *HANDLERS):
        words, _ = prepare(kind, [word for word in rest if word != "--dry-run"], dry)
        print("".join(f"{word}\n" for word in words), end="")
        return
    config = CONFIGS / "datasets" / f"{kind}.yaml"
    config = config if config.is_file() else Path(kind)
    if not config.is_file():
        known = " ".join(sorted(file.name for file in (CONFIGS / "datasets").glob("*.yaml")))
        raise UserError(f"no dataset {kind or '(none given)'}; configs/datasets has {known}")
    from minimind_mcore.preprocess import main as preprocess

    named = ["--config", str(config)]
    if kind != PROBLEMS:
        preprocess.main([*named, *rest])
        return
    _, tokenizer = sample("math-sft", dry, path("TOKENIZER_PATH"))
    raw, tokenizer = sample("math", dry, tokenizer)
    if dry and not (Path(raw).exists() and Path(tokenizer).exists()):
        return  # a dry run makes no sample data, so there is nothing to check
    for part in ("", "_unseen"):
        output = ["--tokenizer-name-or-path", tokenizer, "--output-prefix", f"{data_dir() / PROBLEMS}{part}"]
        preprocess.main([*named, "--input", f"{raw.removesuffix('.jsonl')}{part}.jsonl", *output, *rest])


def prepare(kind: str, more: Sequence[str], dry: bool, seq_length: str = "") -> tuple[list[str], str]:
    """Prepare DATA_PATH, or the sample data, for a training.

    Args:
        kind: "text", "sft" or "dpo".
        more: further flags of preprocess_data.py, which override the settings.
        dry: only check the input.
        seq_length: maximum number of tokens of a sample. "": the setting SEQ_LENGTH.

    Returns:
        The values of --data-path, and the tokenizer directory. A dry run returns no values if the data is not converted
        yet.

    Raises:
        UserError: a setting is missing, or the data cannot be converted.
    """
    raw, tokenizer = env("DATA_PATH"), path("TOKENIZER_PATH")
    if not raw:
        raw, tokenizer = sample(kind, dry, tokenizer)
    elif not tokenizer:
        raise UserError(
            "TOKENIZER_PATH is not set: give the directory of MiniMind's published tokenizer, or train one with\n"
            f"  {sys.executable} -m minimind_mcore.preprocess.train_tokenizer --input '{raw}' --output tokenizer"
        )
    if datasets_at(whole := os.path.abspath(os.path.expanduser(raw))):
        return [whole], tokenizer
    prefix = path("OUTPUT_PREFIX")
    output = ["--output-prefix", prefix] if prefix else ["--cache-dir", str(data_dir() / "cache")]
    words = ["--input", raw, "--tokenizer-type", "PretrainedFromHF", "--tokenizer-name-or-path", tokenizer]
    words += ["--workers", env("WORKERS", str(usable_cores())), *handler_flags(kind, seq_length), *output, *more]
    if dry:
        show([*CLI, "preprocess_data.py", *words])
        # A dry run makes no sample data, so there is nothing to check.
        if not env("DATA_PATH") and not (Path(raw).exists() and Path(tokenizer).exists()):
            return [], tokenizer
        words.append("--dry-run")
    from minimind_mcore.preprocess import main as preprocess  # a slow import that converted data does not need

    return preprocess.prepare(words), tokenizer


def handler_flags(kind: str, seq_length: str) -> list[str]:
    """Return the handler flags of preprocess_data.py for a kind of data."""
    handler = ["--handler-name", env("HANDLER_NAME", HANDLERS.get(kind, "GeneralPretrainHandler"))]
    if kind == "text":
        return [*handler, "--json-keys", *env("JSON_KEYS", "text").split(), "--prepend-bos", "--append-eod"]
    packed = ["--pack", "--neat-pack"] if kind == "sft" and env("PACK", "0") != "0" else []
    length = ["--seq-length", seq_length] if seq_length else flags("SEQ_LENGTH")
    return [*handler, *packed, *length, *flags("PROMPT_TYPE", "MAP_KEYS")]


def sample(kind: str, dry: bool, tokenizer: str) -> tuple[str, str]:
    """Make the sample data of a kind, and a tokenizer unless one is given. Existing files are reused.

    Returns:
        The data file and the tokenizer directory.
    """
    folder = data_dir()
    text = folder / "sample.jsonl"
    file = text if kind == "text" else folder / f"sample_{kind.replace('-', '_')}.jsonl"
    words = ["corpus", "--kind", kind, "--seed", "42", "--output", str(file)]
    if unseen := {"sft": "sample_questions", "math": "sample_math_unseen"}.get(kind):
        words += ["--held-out", f"{folder / unseen}.jsonl"]
    steps = {file: words}
    if not tokenizer:
        tokenizer = str(folder / "tokenizer")
        made = Path(tokenizer, "tokenizer.json")
        if made.exists() and file.exists():
            return str(file), tokenizer
        steps = {
            text: ["corpus", "--seed", "42", "--output", str(text)],
            made: ["tokenizer", "--input", str(text), "--output", tokenizer],
            **({} if kind == "text" else steps),
        }
    if dry:
        make(steps, dry)
    elif not file.exists() or len(steps) > 1:
        with lock(folder / "sample.lock"):
            make(steps, dry)
    return str(file), tokenizer


def make(steps: Mapping[Path, Sequence[str]], dry: bool) -> None:
    """Make each missing file with its command. In a dry run print the commands."""
    from minimind_mcore.cli import dispatch

    for file, command in steps.items():
        if dry and not file.exists():
            show([*CLI, *command])
        elif not file.exists():
            with contextlib.redirect_stdout(sys.stderr):
                dispatch(command)


@contextlib.contextmanager
def lock(directory: Path) -> Iterator[None]:
    """Let one process at a time run the block, among all processes and hosts that share the directory.

    The lock is a directory: `mkdir` is atomic on every filesystem, while some network shares do not support flock.

    Raises:
        UserError: the directory cannot be made, or another process has held it for too long.
    """
    directory.parent.mkdir(parents=True, exist_ok=True)
    waited = 0
    while True:
        try:
            directory.mkdir()
            break
        except FileExistsError:
            pass
        except OSError as error:
            raise UserError(f"cannot write to {directory.parent}: {error.strerror}") from error
        if not waited:
            logger.warning(
                f"waiting for another process that holds {directory}; if no other process runs, remove this directory"
            )
        if waited >= LOCK_SECONDS:
            raise UserError(f"waited 10 minutes for {directory}; if no other process runs, remove this directory")
        time.sleep(2)
        waited += 2
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            directory.rmdir()
