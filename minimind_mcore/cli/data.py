"""Data for a training: what the settings name, converted once, or the sample data."""

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
from minimind_mcore.platform.cpu import usable_cores
from minimind_mcore.preprocess.check import datasets_at

logger = logging.getLogger(__name__)

LOCK_SECONDS = 600
PROBLEMS = "grpo_minimind_math"  # the dataset of reinforcement learning that has sample data
HANDLERS = {"sft": "MiniMindInstructionHandler", "dpo": "MiniMindPairwiseHandler"}


def main(argv: Sequence[str]) -> None:
    """minimind-mcore data text|sft|dpo [flags]: convert data; print the words of --data-path.

    minimind-mcore data NAME [flags]: convert a dataset of configs/datasets, or of another file NAME.yaml. For
    grpo_minimind_math make its sample problems first.

    Settings: DATA_PATH (files, directories, globs, a blend; default: sample data), TOKENIZER_PATH, OUTPUT_PREFIX,
    DATA_DIR, HANDLER_NAME, JSON_KEYS, PROMPT_TYPE, MAP_KEYS, SEQ_LENGTH, PACK=1, WORKERS. The flags are those of
    preprocess_data.py and win; --dry-run converts nothing.
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
        return  # a dry run does not make the sample data, which therefore cannot be checked
    for part in ("", "_unseen"):
        output = ["--tokenizer-name-or-path", tokenizer, "--output-prefix", f"{data_dir() / PROBLEMS}{part}"]
        preprocess.main([*named, "--input", f"{raw.removesuffix('.jsonl')}{part}.jsonl", *output, *rest])


def prepare(kind: str, more: Sequence[str], dry: bool, seq_length: str = "") -> tuple[list[str], str]:
    """Prepare DATA_PATH, or the sample data, for a training.

    Args:
        kind: "text", "sft" or "dpo".
        more: flags of preprocess_data.py, which win.
        dry: check the input and make nothing.
        seq_length: the tokens of a sample, unless SEQ_LENGTH is given.

    Returns:
        The words of --data-path, and the directory of the tokenizer. A dry run returns no words if the data is not yet
        converted.

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
        # A dry run does not make the sample data, which therefore cannot be checked.
        if not env("DATA_PATH") and not (Path(raw).exists() and Path(tokenizer).exists()):
            return [], tokenizer
        words.append("--dry-run")
    from minimind_mcore.preprocess import main as preprocess  # imports much, and is not needed for converted data

    return preprocess.prepare(words), tokenizer


def handler_flags(kind: str, seq_length: str) -> list[str]:
    """Return the flags of preprocess_data.py for a kind of data."""
    handler = ["--handler-name", env("HANDLER_NAME", HANDLERS.get(kind, "GeneralPretrainHandler"))]
    if kind == "text":
        return [*handler, "--json-keys", *env("JSON_KEYS", "text").split(), "--prepend-bos", "--append-eod"]
    packed = ["--pack", "--neat-pack"] if kind == "sft" and env("PACK", "0") != "0" else []
    length = ["--seq-length", seq_length] if seq_length else flags("SEQ_LENGTH")
    return [*handler, *packed, *length, *flags("PROMPT_TYPE", "MAP_KEYS")]


def sample(kind: str, dry: bool, tokenizer: str) -> tuple[str, str]:
    """Make the sample data of a kind, and a tokenizer unless one is given. What exists is used again.

    Returns:
        The file of the data, and the directory of the tokenizer.
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
    """Make the files that do not exist, each by its command. In a dry run show the commands."""
    from minimind_mcore.cli import dispatch

    for file, command in steps.items():
        if dry and not file.exists():
            show([*CLI, *command])
        elif not file.exists():
            with contextlib.redirect_stdout(sys.stderr):
                dispatch(command)


@contextlib.contextmanager
def lock(directory: Path) -> Iterator[None]:
    """Let one process at a time make what several may start together, on this host or on others that share the disk.

    `mkdir` succeeds for one of them on every filesystem; flock does not exist on some network shares.

    Raises:
        UserError: the directory cannot be made, or has existed for too long.
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
            logger.warning(f"waiting for another process; if there is none, remove the directory {directory}")
        if waited >= LOCK_SECONDS:
            raise UserError(f"waited 10 minutes; if nothing else is running here, remove the directory {directory}")
        time.sleep(2)
        waited += 2
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            directory.rmdir()
