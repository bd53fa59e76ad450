"""Smoke tests of the training programs: train, resume, fine-tune, generate, and train with two processes.

    python -m gpu_check.smoke train         # in this process, one run after the other
    python -m gpu_check.smoke layouts       # pretrain_gpt.py in two processes that share the device

Data are generated from a seed and the kit trains the tokenizer, so only the checkout is needed.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import math
import os
import random
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from gpu_check.rows import emit
from minimind_mcore.hosts import free_port

ROOT = Path(__file__).resolve().parents[2]
VOCABULARY, SEQUENCE = 512, 64
MODEL = "minimind3_tiny"
STEPS, SAVED = 6, 3  # steps of the resumed run, and the step of its checkpoint
SAME = 1e-4  # allowed relative difference of fp32 losses between runs that must agree


@dataclasses.dataclass(frozen=True)
class Data:
    """A tokenizer, and the prefixes of the text, conversation and preference datasets."""

    tokenizer: Path
    text: Path
    chat: Path
    pairs: Path


def make_data(folder: Path) -> Data:
    """Train a tokenizer, and write sequences in which each token id is the previous one plus a small step."""
    from minimind_mcore.preprocess import train_tokenizer
    from minimind_mcore.preprocess.indexed import IndexedWriter

    words, numbers = random.Random(1), np.random.default_rng(1)
    texts = (" ".join("".join(words.choices("abcdefgh", k=4)) for _ in range(40)) for _ in range(200))
    train_tokenizer.save(train_tokenizer.train(texts, VOCABULARY), str(folder / "tokenizer"))

    def sequence(length: int, step: int) -> list[int]:
        return ((int(numbers.integers(400)) + step * np.arange(length)) % 460 + 40).tolist()

    def write(name: str, rows: Iterable[list[int]]) -> None:
        kept = list(rows)
        with IndexedWriter(folder / f"{name}_document") as writer:
            writer.add(np.array([token for row in kept for token in row]), np.array([len(row) for row in kept]))

    write("text_text", (sequence(int(numbers.integers(40, 200)), 1 + i % 3) for i in range(200)))
    questions = [sequence(int(numbers.integers(4, 16)), 7) for _ in range(32)]
    for side, step in (("chat", 1), ("chosen", 1), ("rejected", 5)):
        answers = [sequence(12, step) for _ in questions]
        ids = [q + a for q, a in zip(questions, answers, strict=True)]
        labels = [[-100] * len(q) + a for q, a in zip(questions, answers, strict=True)]
        prefix = "chat_packed" if side == "chat" else f"pairs_packed_{side}"
        write(f"{prefix}_input_ids", ids)
        write(f"{prefix}_labels", labels)
        if side == "chat":
            write(f"{prefix}_attention_mask", [[1] * len(row) for row in ids])
    return Data(folder / "tokenizer", folder / "text_text_document", folder / "chat", folder / "pairs")


def command_line(data: Data, prefix: Path, **changes: Any) -> list[str]:
    """Return the flags of a training program. In `changes` True is a flag without a value, and None removes a flag."""
    from minimind_mcore.models.presets import get_preset

    values: dict[str, Any] = {
        "seq_length": SEQUENCE,
        "micro_batch_size": 2,
        "global_batch_size": 4,
        "train_iters": STEPS,
        "lr": 1e-3,
        "min_lr": 1e-3,
        "lr_decay_style": "constant",
        "log_interval": 1,
        "eval_iters": 0,
        "num_workers": 0,
        "split": "100,0,0",
        "data_path": prefix,
        "data_cache_path": prefix.parent / "cache",
        "tokenizer_name_or_path": data.tokenizer,
        "transformer_impl": "local",
        "ckpt_format": "torch",
    }
    words = get_preset(MODEL).replace(vocab_size=VOCABULARY).megatron_flags()
    for name, value in (values | changes).items():
        if value is not None and value is not False:
            words += ["--" + name.replace("_", "-"), *([] if value is True else [str(value)])]
    return words


def column(folder: Path, name: str = "lm_loss") -> list[float]:
    """Return one column of the training rows in a run's metrics.jsonl."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [row[name] for row in rows if name in row]


def apart(found: list[float], expected: list[float]) -> float:
    """Return the largest relative difference of two curves; infinity if their lengths differ."""
    if len(found) != len(expected) or not found:
        return math.inf
    return max(abs(a - b) / abs(b) for a, b in zip(found, expected, strict=True))


# ------------------------------------------------------------------------------------------ one process


def train(folder: Path) -> None:
    """Pretrain, resume, fine-tune and generate in this process, in this order. Each failure is a row."""
    data = make_data(folder)
    saved = folder / "pretrain/checkpoints"
    dropout = {"hidden_dropout": 0.1}  # so that resuming must restore the random state
    tuning = {"pretrained_checkpoint": saved, "train_iters": 16}

    def pretrain() -> None:
        losses = run(folder / "pretrain", command_line(data, data.text, save=saved, save_interval=SAVED, **dropout))
        ok, note = losses[-1] < losses[0], f"last step; {losses[0]:.3f} at first"
        emit("pretraining: loss falls", losses[-1], "nats", ok=ok, note=note)

    def resume() -> None:
        losses = run(folder / "resumed", command_line(data, data.text, load=saved, ckpt_step=SAVED, **dropout))
        difference = apart(losses, column(folder / "pretrain")[SAVED:])
        emit("resume: losses of the same steps", difference, ok=difference <= SAME, note=f"at most {SAME:g}")

    def sft() -> None:
        falls("SFT", run(folder / "sft", command_line(data, data.chat, stage="sft", **tuning), posttrain=True))

    def lora() -> None:
        lora = {"lora_target_modules": "linear_fc2", "lora_r": 16, "lora_alpha": 32, "lr": 5e-3, "min_lr": 5e-3}
        flags = command_line(data, data.chat, stage="sft", **tuning | lora)
        falls("LoRA", run(folder / "lora", flags, posttrain=True))

    def dpo() -> None:
        losses = run(folder / "dpo", command_line(data, data.pairs, stage="dpo", **tuning), posttrain=True)
        falls("DPO", losses)
        emit("DPO: first loss", losses[0], "nats", ok=abs(losses[0] - math.log(2)) < 1e-4, note="expected log 2")

    stages = {"pretraining": pretrain, "resume": resume, "SFT": sft, "LoRA": lora, "DPO": dpo}
    stages["generation"] = functools.partial(generate, saved, data)
    for name, stage in stages.items():
        guarded(name, stage)


def guarded(name: str, stage: Callable[[], None]) -> None:
    """Run one stage. An exception or exit becomes a failed row, so that the next stage can run."""
    try:
        stage()
    except (Exception, SystemExit) as error:
        traceback.print_exc()
        emit(name, ok=False, note=f"{type(error).__name__}: {error}"[:300])
        from megatron.core import parallel_state

        parallel_state.destroy_model_parallel()  # the next stage initialises it again


def falls(name: str, losses: list[float]) -> None:
    """Check that the mean of the last four losses is below the mean of the first four."""
    first, last = (sum(part) / len(part) for part in (losses[:4], losses[-4:]))
    emit(f"{name}: loss falls", last, "nats", ok=last < first, note=f"mean of the last 4 steps; {first:.3f} at first")


def run(folder: Path, argv: list[str], posttrain: bool = False) -> list[float]:
    """Run pretrain_gpt.py or posttrain_gpt.py in this process, and return the losses."""
    from minimind_mcore.posttrain import main as posttraining
    from minimind_mcore.training import pretrain

    (posttraining if posttrain else pretrain).main([*argv, "--output-dir", str(folder)])
    return column(folder)


def generate(checkpoints: Path, data: Data) -> None:
    """Compare the decoder's greedy tokens with transformers' `generate`: single prompts and a padded batch."""
    import torch

    from minimind_mcore.checkpoint.layout import ParallelLayout
    from minimind_mcore.converters.conversion import Conversion
    from minimind_mcore.inference.generation import Generator
    from minimind_mcore.inference.loading import load, open_both
    from minimind_mcore.inference.sampling import SamplingParams

    job = Conversion(load_dir=checkpoints, save_dir=Path(), save_type="hf", layout=ParallelLayout(), dtype="fp32")
    loaded = load(*open_both(job, str(data.tokenizer)))
    prompts = [[1, 70, 71, 72], [1, 300], [1, 44, 45, 46, 47, 48]]
    expected = []
    for prompt in prompts:
        ids = torch.tensor([prompt], device=loaded.device)
        how = {"do_sample": False, "max_new_tokens": 12, "eos_token_id": None, "pad_token_id": 0}
        out = loaded.model.generate(ids, attention_mask=torch.ones_like(ids), **how)
        expected.append(out[0, len(prompt) :].tolist())
    generator = Generator(loaded, SamplingParams(temperature=0), 12)
    generator.stop = []
    together = [one.ids for one in generator.complete(prompts)]
    alone = [generator.complete([prompt])[0].ids for prompt in prompts]
    emit("generation: greedy tokens are transformers'", "equal", ok=alone == expected, note="one prompt at a time")
    emit("generation: a padded batch", "equal", ok=together == expected, note="of three prompts")
    sampled = Generator(loaded, SamplingParams(temperature=0.7, top_k=50, top_p=0.95), 12).complete(prompts)
    inside = all(0 <= token < VOCABULARY for one in sampled for token in one.ids)
    emit("generation: sampled tokens", "inside the vocabulary", ok=inside)


# ------------------------------------------------------------------------------------------ two processes

LAYOUTS: dict[str, dict[str, Any]] = {
    "one process": {},
    "TP2": {"tensor_model_parallel_size": 2},
    "DP2": {},
}


def layouts(folder: Path, seconds: float) -> None:
    """Run one process, TP2 and DP2 at the same time on one device, and compare their losses."""
    data = make_data(folder)
    ranks = {
        name: start(folder / name, command_line(data, data.text, **flags), 1 if name == "one process" else 2)
        for name, flags in LAYOUTS.items()
    }
    deadline = time.monotonic() + seconds
    curves: dict[str, list[float]] = {}
    for name, processes in ranks.items():
        good = all([finished(f"{name}, rank {n}", process, deadline) for n, process in enumerate(processes)])
        curves[name] = column(folder / name) if good else []
        if name != "one process":
            difference = apart(curves[name], curves["one process"])
            note = f"two gloo processes on one device; losses, at most {SAME:g} from one process"
            emit(f"{name}: losses", difference, ok=difference <= SAME, note=note)


def finished(name: str, process: subprocess.Popen[str], deadline: float) -> bool:
    """Wait for one rank, and kill it at the deadline. Return whether it succeeded; if not, print its output."""
    try:
        text, _ = process.communicate(timeout=max(1.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        process.kill()
        text, _ = process.communicate()
    if process.returncode:
        print(f"---- {name}: exit status {process.returncode}\n{text}", flush=True)
    return process.returncode == 0


def start(folder: Path, argv: list[str], count: int) -> list[subprocess.Popen[str]]:
    """Start all ranks of one pretrain_gpt.py run."""
    port = free_port()
    common = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1"}
    command = [sys.executable, str(ROOT / "pretrain_gpt.py"), *argv, "--output-dir", str(folder)]
    command += ["--distributed-backend", "gloo"]
    return [
        subprocess.Popen(
            command,
            env={**os.environ, **common, "MASTER_PORT": str(port), "RANK": str(rank), "LOCAL_RANK": str(rank)},
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(count)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("train", "layouts"))
    parser.add_argument("--tiny", action="store_true", help="has no effect: the sizes are small anyway")
    parser.add_argument("--seconds", type=float, default=180, help="layouts: time limit of a run")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        if args.what == "train":
            train(Path(name))
        else:
            layouts(Path(name), args.seconds)


if __name__ == "__main__":
    main()
