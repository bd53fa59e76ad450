"""Runs of the native training engine for tests: real processes, without the seconds of importing torch in each.

A server process (this file is its program) imports everything once, then forks the ranks of one run
after another; each rank calls `pretrain.main` as pretrain_gpt.py does, or the `main` of post-training. There is one
server per version of megatron-core.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minimind_mcore.hosts import free_port

ROOT = Path(__file__).resolve().parents[2]
TRACKER = "latest_checkpointed_iteration.txt"
KEPT = ("iteration", "consumed_samples", "learning_rate", "lm_loss", "validation_loss", "load_balancing_loss",
        "seq_load_balancing_loss", "rewards/margins", "grad_norm", "skipped_iterations")  # fmt: skip
TIMEOUT = 90.0  # seconds for one run; the slowest takes about ten
LAST_WORDS = 8.0  # seconds for the other ranks after one failed; `errors.run` lets them wait 3 before they speak


@dataclass(frozen=True)
class Run:
    """What a run did.

    Attributes:
        codes: exit status of every rank, as `subprocess` gives it (negative: a signal).
        output: stdout and stderr of all ranks.
        folder: where its metrics.jsonl is.
        seconds: wall-clock time.
    """

    codes: list[int]
    output: str
    folder: Path
    seconds: float

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The training rows of metrics.jsonl."""
        return [row for row in read_rows(self.folder) if "lm_loss" in row]

    def column(self, name: str = "lm_loss") -> list[float]:
        """One column of the training rows."""
        return [row[name] for row in self.rows]


def read_rows(folder: Path) -> list[dict[str, Any]]:
    """All rows of a metrics.jsonl."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


class Server:
    """Client of one server process."""

    def __init__(self, core: str | None = None) -> None:
        """`core` is a directory with another megatron-core; None for the installed one."""
        environment = os.environ | {"OMP_NUM_THREADS": "1", "DEVICE": "cpu", "MPLBACKEND": "Agg"}
        path = [core, str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH")]
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, path))
        self.process = subprocess.Popen(
            [sys.executable, "-m", "helpers.engine"],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(
        self,
        argv: Sequence[str],
        folder: Path,
        processes: int = 1,
        hook: str | None = None,
        environment: dict[str, str] | None = None,
        check: bool = True,
        posttrain: bool = False,
        module: str | None = None,
    ) -> Run:
        """Run pretrain_gpt.py in so many processes; its metrics go to `folder`.

        Args:
            argv: flags.
            folder: `--output-dir`; also holds the output of every rank.
            processes: the world size.
            hook: "path.py:function", called in every rank before the run, to break something.
            environment: variables for the ranks.
            check: fail unless every rank exits with status 0.
            posttrain: run posttrain_gpt.py instead.
            module: run the `main` of this module instead.
        """
        folder.mkdir(parents=True, exist_ok=True)
        job = {
            "argv": [*argv, "--output-dir", str(folder)],
            "folder": str(folder),
            "processes": processes,
            "hook": hook,
            "environment": environment or {},
            "module": module or ("minimind_mcore.posttrain.main" if posttrain else "minimind_mcore.training.pretrain"),
        }
        assert self.process.stdin and self.process.stdout
        started = time.monotonic()
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        assert answer, "the server died"
        codes = json.loads(answer)
        output = "".join((folder / f"rank{rank}.log").read_text(errors="replace") for rank in range(processes))
        run = Run(codes, output, folder, time.monotonic() - started)
        assert not check or codes == [0] * processes, f"exit statuses {codes}\n{output}"
        return run

    def close(self) -> None:
        """Stop the server."""
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait(timeout=30)


@dataclass(frozen=True)
class Corpus:
    """A tokenizer and a dataset made with its vocabulary size."""

    tokenizer: Path
    prefix: Path
    vocab_size: int

    def flags(self, model: Any, **changes: Any) -> list[str]:
        """A complete command line for a model of this vocabulary; changes by flag name, None leaves one out."""
        model = model.replace(vocab_size=self.vocab_size)
        values: dict[str, Any] = {
            "seq_length": 32,
            "micro_batch_size": 4,
            "global_batch_size": 8,
            "train_iters": 10,
            "lr": 1e-3,
            "min_lr": 1e-4,
            "lr_decay_style": "cosine",
            "log_interval": 1,
            "eval_iters": 0,
            "num_workers": 0,
            "split": "100,0,0",
            "data_path": self.prefix,
            "data_cache_path": self.prefix.parent / "cache",
            "tokenizer_name_or_path": self.tokenizer,
            "transformer_impl": "local",
        }
        return [*model.megatron_flags(), *as_flags(values | changes)]


def as_flags(values: dict[str, Any]) -> list[str]:
    """`{"seq_length": 8, "bf16": True, "load": None}` as `["--seq-length", "8", "--bf16"]`."""
    words: list[str] = []
    for name, value in values.items():
        if value is None or value is False:
            continue
        words.append("--" + name.replace("_", "-"))
        if value is not True:
            words.append(str(value))
    return words


def layout(tp: int = 1, pp: int = 1, ep: int = 1, per_virtual_stage: int | None = None, **more: Any) -> dict[str, Any]:
    """Flags of a parallel layout, for `Corpus.flags`."""
    return {
        "tensor_model_parallel_size": tp,
        "pipeline_model_parallel_size": pp,
        "expert_model_parallel_size": ep,
        "num_layers_per_virtual_pipeline_stage": per_virtual_stage,
        **more,
    }


def worst_difference(found: Sequence[float], expected: Sequence[float]) -> float:
    """Largest relative difference of two curves."""
    assert len(found) == len(expected) and len(found) > 0
    return max(abs(a - b) / abs(b) for a, b in zip(found, expected, strict=True))


def facts(run: Run) -> list[dict[str, Any]]:
    """The rows of a run, without what depends on the clock or the machine."""
    return [{key: value for key, value in row.items() if key in KEPT} for row in read_rows(run.folder)]


def load(file: Path) -> Any:
    """A checkpoint file."""
    import torch

    return torch.load(file, map_location="cpu", weights_only=False)


def same(a: Any, b: Any) -> bool:
    """Equal to the last bit; the namespaces of arguments, which name directories, are not compared."""
    import torch

    if isinstance(a, argparse.Namespace):
        return True
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b) and a.dtype == b.dtype
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return bool((a == b).all()) if hasattr(a, "all") else bool(a == b)


# The server.


@dataclass
class _Ranks:
    """The processes of one run."""

    job: dict[str, Any]
    port: int
    pids: list[int] = dataclasses.field(default_factory=list)
    codes: dict[int, int] = dataclasses.field(default_factory=dict)

    def start(self) -> None:
        for rank in range(self.job["processes"]):
            pid = os.fork()
            if pid == 0:
                _be_rank(self.job, rank, self.port)
            self.pids.append(pid)

    def wait(self) -> list[int]:
        """Exit statuses; as torchrun does, a rank that fails ends the others."""
        deadline = time.monotonic() + TIMEOUT
        while len(self.codes) < len(self.pids):
            time.sleep(0.01)
            for pid in self.pids:
                if pid not in self.codes and (found := os.waitpid(pid, os.WNOHANG))[0]:
                    self.codes[pid] = os.waitstatus_to_exitcode(found[1])
            failed = any(code != 0 for code in self.codes.values())
            if failed:  # the others may still be about to say why
                deadline = min(deadline, time.monotonic() + LAST_WORDS)
            if time.monotonic() > deadline:
                for pid in set(self.pids) - set(self.codes):
                    os.kill(pid, signal.SIGKILL)
                deadline = float("inf")
        return [self.codes[pid] for pid in self.pids]


def _be_rank(job: dict[str, Any], rank: int, port: int) -> None:
    """Never returns."""
    code = 1
    try:
        log = os.open(Path(job["folder"]) / f"rank{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.environ.update(
            RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(job["processes"]), MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port), **job["environment"],
        )  # fmt: skip
        from minimind_mcore import errors

        program = importlib.import_module(job["module"])
        if job["hook"]:
            load_hook(job["hook"])()
        errors.run(lambda: program.main(job["argv"]))
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def load_hook(name: str) -> Any:
    """The function that "path.py:function" names."""
    path, function = name.rsplit(":", 1)
    spec = importlib.util.spec_from_file_location("hook", path)
    assert spec and spec.loader
    module = sys.modules["hook"] = importlib.util.module_from_spec(spec)  # dataclasses look their module up
    spec.loader.exec_module(module)
    return getattr(module, function)


def serve() -> None:
    """Read jobs from stdin, one JSON object a line; answer with the exit statuses of their ranks."""
    from minimind_mcore.platform import device

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    device.setup()
    import matplotlib.pyplot  # noqa: F401
    import megatron.core.datasets.gpt_dataset
    import megatron.core.distributed
    import megatron.core.optimizer
    import megatron.core.pipeline_parallel  # noqa: F401
    import torch

    import minimind_mcore.models.minimind_spec
    import minimind_mcore.posttrain.main  # noqa: F401

    torch.set_num_threads(1)
    for line in sys.stdin:
        ranks = _Ranks(json.loads(line), free_port())
        ranks.start()
        answers.write(json.dumps(ranks.wait()) + "\n")
        answers.flush()


if __name__ == "__main__":
    serve()
