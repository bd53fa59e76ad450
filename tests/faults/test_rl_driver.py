"""The program itself is killed, or asked to stop, on a cluster that goes on: nothing is left there, nothing is lost."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import yaml
from helpers import engine, rl_ray, rl_trees

from minimind_mcore.hosts import free_port
from minimind_mcore.rl.runtime.hosts import end, own_address
from minimind_mcore.storage import atomic_write_text

STEPS = 6
PATIENCE = 180.0
SAME = ("grpo/score/mean", "actor/pg_loss", "actor/kl_loss", "actor/grad_norm", "response_length/mean")
pytestmark = pytest.mark.timeout(900)


class Cluster:
    """A Ray node of this machine, and runs on it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.address = f"{own_address(None, None)}:{free_port()}"
        self.ray = Path("/tmp") / f"rld{os.getpid()}"
        self.gate = folder / "gate"
        paths = [str(engine.ROOT), str(engine.ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
        self.environment = os.environ | {
            "DEVICE": "cpu", "RAY_ADDRESS": self.address, "RAY_AUTH_MODE": "disabled", "OMP_NUM_THREADS": "1",
            "MPLBACKEND": "Agg", "RL_GATE": str(self.gate), "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        }  # fmt: skip
        host, _, port = self.address.rpartition(":")
        flags = ["--node-ip-address", host, "--port", port, "--num-cpus", "2", "--include-dashboard=false"]
        self.node = self.start(
            "-m", "ray.scripts.scripts", "start", "--head", "--block", "--temp-dir", str(self.ray), *flags, log="ray"
        )  # fmt: skip

    def start(self, *command: str, log: str) -> subprocess.Popen[bytes]:
        with open(self.folder / f"{log}.log", "ab") as file:
            return subprocess.Popen(
                [sys.executable, *command], env=self.environment, cwd=self.folder, stdout=file, stderr=file
            )

    def allow(self, steps: int) -> None:
        """Let this many steps of a run be scored; the next one waits."""
        atomic_write_text(self.gate, str(steps))

    def train(self, config: Path, allowed: int) -> subprocess.Popen[bytes]:
        """Start a run, of which so many steps pass for now."""
        self.allow(allowed)
        program = str(engine.ROOT / "train_grpo.py")
        return self.start(program, "--config-name", config.stem, "--config-dir", str(config.parent), log=config.stem)

    def said(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text(encoding="utf-8", errors="replace")

    def actors(self) -> list[psutil.Process]:
        """The actors of runs, and the processes that they have started."""
        found = []
        for process in psutil.Process(self.node.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                if re.match("ray::(Train|Rollout|Reward)Worker", " ".join(process.cmdline())):
                    found += [process, *process.children(recursive=True)]
        return found


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A cluster that is there before the runs, and after them."""
    cluster = Cluster(tmp_path_factory.mktemp("cluster"))
    yield cluster
    end(cluster.node.pid)
    cluster.node.wait()


def until(true: Callable[[], bool], what: str, cluster: Cluster, log: str, seconds: float = PATIENCE) -> None:
    """Wait for something."""
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, f"not {what} within {seconds:g} s\n{cluster.said(log)}"
        time.sleep(0.02)


def configuration(corpus: engine.Corpus, folder: Path, name: str) -> Path:
    """A YAML of a run that saves after every second step."""
    prompts = folder / "prompts"
    if not Path(f"{prompts}_packed_input_ids_document.idx").exists():
        rl_trees.write_prompts(prompts, 32)
    tree = rl_trees.run_tree(corpus, prompts, folder / name)
    tree["megatron_training"] |= {"train_iters": STEPS, "save_interval": 2}
    tree["rl_config"] |= {"verifier_function": ["helpers.rl_trees:gated"], "verifier_timeout": int(2 * PATIENCE)}
    tree["minimind"] |= {"cluster_wait_s": PATIENCE, "actor_timeout_s": PATIENCE}
    file = folder / f"{name}.yaml"
    file.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return file


def steps(folder: Path) -> list[int]:
    """The steps that a run has logged."""
    return [row["iteration"] for row in rl_ray.rows(folder)] if (folder / "metrics.jsonl").exists() else []


def test_a_killed_or_stopped_driver_leaves_nothing_and_the_same_command_goes_on(
    corpus: engine.Corpus, tmp_path: Path, cluster: Cluster
) -> None:
    config, calm = (configuration(corpus, tmp_path, name) for name in ("stopped", "calm"))
    folder = tmp_path / "stopped"

    run = cluster.train(config, 3)
    until(lambda: 3 in steps(folder), "at step 3", cluster, "stopped")
    actors = cluster.actors()
    assert len(actors) >= 5  # two ranks, two engines, the rewards
    run.kill()
    run.wait()
    until(lambda: not any(map(psutil.Process.is_running, actors)), "rid of its actors", cluster, "stopped", 60)

    run = cluster.train(config, 1)  # from the checkpoint of step 2
    until(
        lambda: len(re.findall(r"\b3/\d+ +reward", cluster.said("stopped"))) == 2, "at step 3 again", cluster, "stopped"
    )
    run.send_signal(signal.SIGTERM)
    said = "SIGTERM: saving after this iteration"
    until(lambda: said in cluster.said("stopped"), "told of the signal", cluster, "stopped")
    cluster.allow(STEPS)
    assert run.wait(PATIENCE) == 128 + signal.SIGTERM, cluster.said("stopped")
    until(lambda: not cluster.actors(), "rid of its actors", cluster, "stopped", 60)
    saved = int((folder / "checkpoints/latest_checkpointed_iteration.txt").read_text())
    assert saved == steps(folder)[-1] == 4

    run = cluster.train(config, STEPS)
    assert run.wait(PATIENCE) == 0, cluster.said("stopped")
    assert f"step {saved} of {STEPS} is done" in cluster.said("stopped")
    run = cluster.train(calm, STEPS)
    assert run.wait(PATIENCE) == 0, cluster.said("calm")
    found, expected = ({row["iteration"]: row for row in rl_ray.rows(tmp_path / n)} for n in ("stopped", "calm"))
    for step in range(1, STEPS + 1):
        assert [found[step][name] for name in SAME] == [expected[step][name] for name in SAME], step


@pytest.mark.slow
def test_ctrl_c_saves_and_a_signal_before_the_first_step_ends_at_once(
    corpus: engine.Corpus, tmp_path: Path, cluster: Cluster
) -> None:
    config = configuration(corpus, tmp_path, "interrupted")
    run = cluster.train(config, STEPS)
    until(lambda: "joined the Ray cluster" in cluster.said("interrupted"), "joined", cluster, "interrupted")
    run.send_signal(signal.SIGTERM)
    assert run.wait(60) != 0
    assert not (tmp_path / "interrupted/checkpoints").exists()
    until(lambda: not cluster.actors(), "rid of its actors", cluster, "interrupted", 60)
    run = cluster.train(config, 1)
    until(lambda: 1 in steps(tmp_path / "interrupted"), "at step 1", cluster, "interrupted")
    run.send_signal(signal.SIGINT)
    said = "SIGINT: saving after this iteration"
    until(lambda: said in cluster.said("interrupted"), "told of the signal", cluster, "interrupted")
    cluster.allow(STEPS)
    assert run.wait(PATIENCE) == 128 + signal.SIGINT, cluster.said("interrupted")
    saved = int((tmp_path / "interrupted/checkpoints/latest_checkpointed_iteration.txt").read_text())
    assert saved == steps(tmp_path / "interrupted")[-1] < STEPS
    assert "Traceback" not in cluster.said("interrupted")
