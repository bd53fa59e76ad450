"""Runs of the Ray trainer for tests, each set in a process of its own with a Ray of its own.

`python rl_ray.py FOLDER` reads `runs.json` there: a list of {"name", "tree", "kills": {step: ["KIND@PHASE", ...]}},
done one after another on one small cluster. Kinds are actors: manager, rollout, reward, actor, reference, critic. The
phases are those of a step: rollout, reward, logprob, update, sync, save; an actor is killed just after the phase's call
was made.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from helpers import engine

ROOT = Path(__file__).resolve().parents[2]


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
            [sys.executable, "-m", "helpers.rl_ray", str(folder)],
            env=environment,
            stdout=file,
            stderr=subprocess.STDOUT,
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
    from ray.exceptions import RayActorError

    from minimind_mcore import log
    from minimind_mcore.rl.config.load import resolve
    from minimind_mcore.rl.runtime.trainer import Trainer, train

    log.setup()

    def process_id(actor: Any) -> int:
        return int(ray.get(actor.__ray_call__.remote(lambda worker: os.getpid())))

    class Victim(Trainer):
        """Kills its own actors where it is told to, once each."""

        kills: dict[str, list[str]]
        number = 0

        def generate(self) -> None:
            self.number = self.done + 1
            # Asked beforehand: a busy actor does not answer.
            manager, reference = self.rollouts, self.groups.reference
            actors = {"rollout": self.groups.rollout.pool.actors[0], "reward": self.groups.rewards.actors[0]}
            actors["manager"] = manager.actor
            for group in [*self.groups.training(), *([reference] if reference is not None else [])]:
                group.submit = self.watched(type(group).submit.__get__(group))  # type: ignore[method-assign]
                actors[group.role] = group.actors[-1]
            self.pids = {}
            for kind, actor in actors.items():
                with contextlib.suppress(RayActorError):  # killed after its last use in a step
                    self.pids[kind] = process_id(actor)
            manager.submit = self.watched(type(manager).submit.__get__(manager))  # type: ignore[method-assign]
            super().generate()

        def at(self, phase: str) -> None:
            """Kill who is to be killed now."""
            wanted = self.kills.get(str(self.number), [])
            for victim in [one for one in wanted if one.endswith(f"@{phase}")]:
                wanted.remove(victim)
                os.kill(self.pids[victim.partition("@")[0]], signal.SIGKILL)

        def watched(self, submit: Any) -> Any:
            phases = {"generate": "rollout", "rewards": "reward", "measure": "logprob", "update": "update"}
            phases |= {"publish": "sync", "save": "save"}

            def call(method: str, *arguments: Any, **more: Any) -> Any:
                refs = submit(method, *arguments, **more)
                if method in phases:
                    self.at(phases[method])
                return refs

            return call

    folder = Path(sys.argv[1])
    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        object_store_memory=200 << 20,
        _temp_dir=os.environ["RAY_TMPDIR"],
        logging_level=logging.WARNING,
    )
    for task in json.loads((folder / "runs.json").read_text(encoding="utf-8")):
        started = time.monotonic()
        trainer = Victim(resolve(task["tree"]))
        trainer.kills = task.get("kills", {})
        try:
            train(trainer)
        finally:
            trainer.groups.close()
        assert not any(trainer.kills.values()), f"not killed: {trainer.kills}"
        print(f"{task['name']}: {time.monotonic() - started:.1f} s", flush=True)
    ray.shutdown()


if __name__ == "__main__":
    main()
