"""Runs of the Ray trainer for tests, each set in a process of its own with a Ray of its own.

`python rl_ray.py FOLDER` reads `runs.json` there: a list of {"name", "tree", "kills": {step: [kind, ...]}}, done one
after another on one small cluster. "rollout" is killed while it writes, "reward" before it scores, "actor" before it
trains.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import engine

ROOT = Path(__file__).resolve().parents[1]


def run(folder: Path, runs: list[dict[str, Any]], timeout: float) -> str:
    """Do them; returns what they printed. Fails where one fails, or takes longer than `timeout` seconds."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "runs.json").write_text(json.dumps(runs), encoding="utf-8")
    short = Path(os.environ.get("TMPDIR", "/tmp")) / f"ray-{os.getpid()}"  # sockets' paths must be short
    environment = os.environ | {
        "DEVICE": "cpu",
        "RAY_ADDRESS": "local",
        "RAY_TMPDIR": str(short),
        "RAY_AUTH_MODE": "disabled",
        "OMP_NUM_THREADS": "1",
        "MPLBACKEND": "Agg",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH")])),
    }
    log = folder / "output.log"
    with open(log, "w", encoding="utf-8") as file:
        process = subprocess.Popen(
            [sys.executable, __file__, str(folder)], env=environment, stdout=file, stderr=subprocess.STDOUT
        )
        try:
            code: int | str = process.wait(timeout)
        except subprocess.TimeoutExpired:
            process.kill()  # its Ray ends with it
            process.wait()
            code = f"no end within {timeout:g} s"
    output = log.read_text(encoding="utf-8")
    assert code == 0, f"{code}\n{output}"
    return output


def rows(folder: Path) -> list[dict[str, Any]]:
    """The steps of a run's metrics.jsonl."""
    return [row for row in engine.read_rows(folder) if "timing/all" in row]


def main() -> None:
    """Do the runs of a folder."""
    import ray

    from minimind_mcore.rl.config import resolve
    from minimind_mcore.rl.trainer import Trainer

    class Victim(Trainer):
        """Kills its own actors where it is told to, once each."""

        kills: dict[str, list[str]]

        def due(self, step: int, kind: str) -> bool:
            """Whether to kill one of that kind now."""
            wanted = self.kills.get(str(step), [])
            if kind not in wanted:
                return False
            wanted.remove(kind)
            return True

        def step(self, number: int) -> None:
            self.number = number
            super().step(number)

        def rollouts(self, number: int) -> Any:
            if self.due(number, "rollout"):
                pid = ray.get(self.groups.rollout.pool.actors[0].pid.remote())
                self.source.begin()
                os.kill(pid, signal.SIGKILL)
            found = super().rollouts(number)
            if self.due(number, "reward"):
                os.kill(ray.get(self.groups.rewards.actors[0].pid.remote()), signal.SIGKILL)
            if self.due(number, "actor"):
                os.kill(self.groups.actor.pids[-1], signal.SIGKILL)
            return found

    folder = Path(sys.argv[1])
    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        object_store_memory=200 << 20,
        _temp_dir=os.environ["RAY_TMPDIR"],
        logging_level="WARNING",
    )
    for task in json.loads((folder / "runs.json").read_text(encoding="utf-8")):
        started = time.monotonic()
        trainer = Victim(resolve(task["tree"]))
        trainer.kills = task.get("kills", {})
        try:
            trainer.run()
        finally:
            trainer.groups.close()
        assert not any(trainer.kills.values()), f"not killed: {trainer.kills}"
        print(f"{task['name']}: {time.monotonic() - started:.1f} s", flush=True)
    ray.shutdown()


if __name__ == "__main__":
    main()
