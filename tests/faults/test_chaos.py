"""Faults at random times: every run goes on bit for bit or is refused with the reason, and nothing finished is lost.

A round is repeated by its number: `pytest tests/faults/test_chaos.py -m slow -k 07-`. CHAOS_SEED gives other rounds.
"""

from __future__ import annotations

import collections
import json
import os
import random
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers import chaos, engine, rl_trees
from helpers.chaos import Attempt, Cut, Ended, Round, Served, Started
from helpers.disks import small_disk

from minimind_mcore.hosts import free_port
from minimind_mcore.models.presets import PRESETS

CONFIG = PRESETS["minimind2_small_tiny"]
PRETRAINING = ("torch-1", "torch-2", "torch_dist-1", "torch_dist-2")
LAYOUTS = {"torch-2": engine.layout(tp=2), "torch_dist-2": engine.layout(use_distributed_optimizer=True)}
KINDS = ("kill", "stop", "stop-kill", "limit", "disk", "cut", "cut")
LAUNCHED = ("kill", "kill", "stop", "request")
RAY = ("kill", "kill", "stop", "stop-kill", "request", "cut")
FAULTS = {
    "kill": chaos.kill, "cut": chaos.kill, "stop": chaos.stop, "stop-kill": chaos.stop_and_kill,
    "request": chaos.request, "limit": chaos.fill, "disk": chaos.fill,
}  # fmt: skip
ROUNDS = [
    Round(number, kind, trainer)
    for number, (kind, trainer) in enumerate(
        [
            *((kind, trainer) for kind in KINDS for trainer in PRETRAINING),
            # Not torch_dist: its writer is forked, and a lock of faketime that another thread holds then stays locked.
            *(("clock", trainer) for trainer in ("torch-1", "torch-2") * 2),
            *((kind, "launcher") for kind in LAUNCHED),
            *((kind, "grpo") for kind in (*KINDS, "clock")),
            *((kind, "ray") for kind in RAY),
        ],
        start=1,
    )
]
STEPS = {"grpo": 6, "ray": 6}  # of a run; others take 24
SAME = {
    "pretraining": ("iteration", "consumed_samples", "learning_rate", "lm_loss", "grad_norm", "skipped_iterations"),
    "grpo": ("iteration", "grpo/score/mean", "actor/pg_loss", "actor/kl_loss", "actor/grad_norm", "actor/lr",
             "response_length/mean"),
}  # fmt: skip
OUTCOMES = ("resumed exactly", "refused with the reason, then resumed exactly", "wrong")


class Subject:
    """A run in a folder: its attempts, and where its results are.

    Args:
        trainer: one of PRETRAINING, or launcher, grpo, ray.
        folder: of everything that it reads and writes.
        corpus: copied there.
        server: for attempts that are forked.
    """

    def __init__(self, trainer: str, folder: Path, corpus: engine.Corpus, server: engine.Server) -> None:
        self.trainer, self.folder, self.run = trainer, folder, folder / "run"
        self.checkpoints = self.run / "checkpoints"
        self.steps = STEPS.get(trainer, 24)
        data = folder / "data"
        shutil.copytree(corpus.tokenizer, data / "tokenizer")
        for kind in (".bin", ".idx"):
            shutil.copy(corpus.prefix.with_suffix(kind), data / f"text_document{kind}")
        self.corpus = engine.Corpus(data / "tokenizer", data / "text_document", corpus.vocab_size)
        self.attempt: Attempt
        if trainer in ("grpo", "ray"):
            self.attempt = self._reinforcement(server)
        elif trainer == "launcher":
            program = [str(engine.ROOT / "pretrain_gpt.py"), *self._flags("torch-2"), "--output-dir", str(self.run)]
            port = str(free_port())
            command = ["-m", "minimind_mcore.launch", "--nproc-per-node", "2", "--master-port", port, *program]
            self.attempt = Started(command, self.run, self.steps, r"pretrain_gpt\.py", {})
        else:
            self.attempt = Served(server, self._flags(trainer), self.run, self.steps, int(trainer[-1]), None)

    def _flags(self, trainer: str) -> list[str]:
        flags = {
            "train_iters": self.steps, "save": self.checkpoints, "load": self.checkpoints, "save_interval": 3,
            "ckpt_format": trainer.partition("-")[0], "data_cache_path": self.folder / "cache",
        }  # fmt: skip
        return self.corpus.flags(CONFIG, **flags, **LAYOUTS.get(trainer, {}))

    def _reinforcement(self, server: engine.Server) -> Attempt:
        prompts = rl_trees.write_prompts(self.folder / "data" / "prompts")
        tree = rl_trees.run_tree(self.corpus, prompts, self.run)
        tree["megatron_training"] |= {"train_iters": self.steps, "save_interval": 2}
        if self.trainer == "grpo":
            (self.folder / "tree.json").write_text(json.dumps(tree), encoding="utf-8")
            return Served(
                server, ["--tree", str(self.folder / "tree.json")], self.run, self.steps, 1, "helpers.rl_local"
            )
        (self.folder / "run.yaml").write_text(yaml.safe_dump(tree), encoding="utf-8")
        command = [str(engine.ROOT / "train_grpo.py"), "--config-name", "run", "--config-dir", str(self.folder)]
        environment = {"RAY_ADDRESS": "local", "RAY_TMPDIR": f"/tmp/chaos{os.getpid()}", "RAY_AUTH_MODE": "disabled"}
        return Started(command, self.run, self.steps, "^ray::(Train|Rollout|Reward)Worker", environment)

    @property
    def last(self) -> Path:
        return self.checkpoints / f"iter_{self.steps:07d}"

    def rows(self) -> dict[int, list[Any]]:
        """What the metrics say of each step, without what depends on the clock; no step is there twice."""
        names = SAME["grpo" if self.trainer in ("grpo", "ray") else "pretraining"]
        rows = [row for row in engine.read_rows(self.run) if "lm_loss" in row or "actor/pg_loss" in row]
        found = {row["iteration"]: [row[name] for name in names] for row in rows}
        assert len(found) == len(rows), [row["iteration"] for row in rows]
        return found


class Laboratory:
    """Undisturbed runs, made when they are first needed, and the outcomes of rounds."""

    def __init__(self, folder: Path, corpus: engine.Corpus, server: engine.Server) -> None:
        self.folder, self.corpus, self.server = folder, corpus, server
        self.clock = folder / "clock"
        self.clock_server: engine.Server | None = None
        self.calm_runs: dict[str, tuple[Subject, float]] = {}
        self.outcomes: collections.Counter[tuple[str, str]] = collections.Counter()

    def calm(self, trainer: str) -> tuple[Subject, float]:
        """The undisturbed run of a trainer, and how many seconds it took."""
        if trainer not in self.calm_runs:
            shutil.rmtree(self.folder / trainer, ignore_errors=True)
            subject = Subject(trainer, self.folder / trainer, self.corpus, self.server)
            seconds = float("inf")
            # The first run of a server also warms up the server and the caches of files.
            for _ in range(2 if isinstance(subject.attempt, Served) else 1):
                shutil.rmtree(subject.run, ignore_errors=True)
                started = chaos.time.monotonic()
                subject.attempt.start()
                ended = subject.attempt.finish()
                seconds = min(seconds, chaos.time.monotonic() - started)
                assert set(ended.codes) == {0}, ended.output
            self.calm_runs[trainer] = subject, seconds
        return self.calm_runs[trainer]

    def with_clock(self) -> engine.Server:
        """A server whose ranks read the clock that the file `clock` gives; skips without Debian's faketime."""
        if self.clock_server is None:
            if shutil.which("faketime") is None:
                pytest.skip("needs faketime, which sets the clock of a process: apt-get install faketime")
            command = ["faketime", "-m", "-f", "+0", "printenv", "LD_PRELOAD"]
            library = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
            self.clock.write_text("+0")
            # faketime 0.9.10 refuses to sleep until a time of the monotonic clock, as time.sleep of Python 3.11 does.
            (self.folder / "sitecustomize.py").write_text(
                "import select, time\ntime.sleep = lambda seconds: select.select([], [], [], max(seconds, 0))\n"
            )
            paths = filter(None, [str(self.folder), os.environ.get("PYTHONPATH")])
            variables = {
                "LD_PRELOAD": library, "FAKETIME_TIMESTAMP_FILE": str(self.clock), "FAKETIME_NO_CACHE": "1",
                "FAKETIME_DONT_FAKE_MONOTONIC": "1", "FAKETIME_DONT_RESET": "1",
                "PYTHONPATH": os.pathsep.join(paths),
            }  # fmt: skip
            with pytest.MonkeyPatch.context() as patch:
                for name, value in variables.items():
                    patch.setenv(name, value)
                self.clock_server = engine.Server()
        return self.clock_server

    def close(self) -> None:
        if self.clock_server is not None:
            self.clock_server.close()


@pytest.fixture(scope="module")
def laboratory(
    request: pytest.FixtureRequest,
    corpus: engine.Corpus,
    server: engine.Server,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Laboratory]:
    """What the rounds share; at the end the table of their outcomes is printed."""
    laboratory = Laboratory(tmp_path_factory.mktemp("calm"), corpus, server)
    yield laboratory
    laboratory.close()
    reporter: Any = request.config.pluginmanager.getplugin("terminalreporter")
    names = sorted({name for name, _ in laboratory.outcomes})
    lines = [f"{name} | " + " | ".join(str(laboratory.outcomes[name, one]) for one in OUTCOMES) for name in names]
    capture: Any = request.config.pluginmanager.getplugin("capturemanager")
    with capture.global_and_fixture_disabled():
        for line in ["", f"chaos, seed {chaos.SEED}: fault, trainer | {' | '.join(OUTCOMES)}", *lines]:
            reporter.write_line(line)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("one", ROUNDS, ids=str)
def test_a_disturbed_run_goes_on_exactly_or_says_why_not(one: Round, laboratory: Laboratory, tmp_path: Path) -> None:
    print(f"CHAOS_SEED={chaos.SEED}, round {one}")
    kind = f"{one.kind}, {'pretraining' if one.trainer in PRETRAINING else one.trainer}"
    laboratory.outcomes[kind, "wrong"] += 1
    refused = disturbed(one, laboratory, tmp_path)
    laboratory.outcomes[kind, "wrong"] -= 1
    laboratory.outcomes[kind, OUTCOMES[bool(refused)]] += 1


def disturbed(one: Round, laboratory: Laboratory, folder: Path) -> list[str]:
    """Do a round; returns the sentences with which attempts were refused."""
    calm, longest = laboratory.calm(one.trainer)
    chance = one.random()
    server = laboratory.with_clock() if one.kind == "clock" else laboratory.server
    subject = Subject(one.trainer, folder, laboratory.corpus, server)
    if one.kind == "disk":
        used = sum(p.stat().st_size for p in calm.run.rglob("*") if p.is_file())
        with small_disk(subject.run, chance.uniform(0.2, 0.9) * used / 2**20) as disk:
            refused = attempts(one, laboratory, subject, chance, longest, {})
            subprocess.run(["mount", "-o", "remount,size=1g", str(disk)], check=True)
            resumed(subject, calm, set())
        return refused
    largest = max(p.stat().st_size for p in calm.run.rglob("*") if p.is_file())
    limits = {n: int(300 * (largest / 300) ** chance.uniform(0.0, 1.05)) for n in range(2) if one.kind == "limit"}
    refused = attempts(one, laboratory, subject, chance, longest, limits)
    lost: set[int] = set()
    if one.kind == "cut":
        cut = Cut.at_random([subject.run, folder / "data", folder / "cache"], chance)
        print(cut)
        before = set(subject.checkpoints.glob("iter_*"))
        subject.attempt.start()
        ended = subject.attempt.finish()
        print(ended.output)
        if set(ended.codes) != {0}:
            require_sentence(ended)
            refused = ended.refusals
            assert before <= set(subject.checkpoints.glob("iter_*")), "a refused run has removed checkpoints"
            cut.undo()
        elif cut.file.name == "metrics.jsonl":
            lost = set(range(1, subject.steps + 1))
    resumed(subject, calm, lost)
    return refused


def attempts(
    one: Round, laboratory: Laboratory, subject: Subject, chance: random.Random, longest: float, limits: dict[int, int]
) -> list[str]:
    """Start the run and disturb it, twice where it did not end by itself; returns why it was refused."""
    fault = chaos.jump(laboratory.clock) if one.kind == "clock" else FAULTS[one.kind]
    saved: set[int] = set()
    refused: list[str] = []
    number, missed = 0, 0
    while number < 2:
        subject.attempt.start(limits.get(number, 0))
        met = fault(subject.attempt, chance, longest)
        ended = subject.attempt.finish()
        if not met and number == 0:  # the run was quicker than the fault
            assert set(ended.codes) == {0} and missed < 5, ended.output
            missed += 1
            shutil.rmtree(subject.run)
            continue
        print(f"attempt {number + 1}: exit statuses {ended.codes}, refused: {ended.refusals}\n{ended.output}")
        saved |= {int(found) for found in chaos.SAVED.findall(ended.output)}
        assert "Traceback" not in ended.output, ended.output
        assert not chaos.damaged_checkpoints(subject.checkpoints, saved)
        if one.kind in ("limit", "disk") and set(ended.codes) != {0}:
            require_sentence(ended)
            refused += ended.refusals
        if one.kind in ("stop", "clock") and all(code >= 0 for code in ended.codes):
            assert set(ended.codes) == {0}, ended.output  # a pause, or a clock, ends nothing
        if one.kind == "request":
            assert ended.codes in ([0], [143], [-15]), ended
        if set(ended.codes) == {0}:
            break
        number += 1
    return refused


def require_sentence(ended: Ended) -> None:
    """A refusal is one sentence that all ranks agree on, after "error: ", and no traceback."""
    assert 0 not in ended.codes, ended
    assert "Traceback" not in ended.output, ended.output
    assert all(code > 0 or code == -9 for code in ended.codes) and ended.refusals, ended


def resumed(subject: Subject, calm: Subject, lost: set[int]) -> None:
    """The same command once more ends well, with the checkpoint and the metrics of the undisturbed run."""
    subject.attempt.start()
    ended = subject.attempt.finish()
    print(ended.output)
    assert set(ended.codes) == {0}, ended.output
    assert "Traceback" not in ended.output, ended.output
    assert (subject.checkpoints / engine.TRACKER).read_text() == str(subject.steps)
    assert not chaos.damaged_checkpoints(subject.checkpoints, {subject.steps})
    found, expected = subject.rows(), calm.rows()
    assert expected.keys() - found.keys() <= lost, sorted(expected.keys() - found.keys())
    wrong = [step for step, row in found.items() if row != expected[step]]
    assert not wrong, [(found[step], expected[step]) for step in wrong]
    assert not chaos.differing(chaos.state(subject.last), chaos.state(calm.last))
