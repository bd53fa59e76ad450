"""The driver, with models and a manager that only count: after a loss no step is trained twice, and none is skipped."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from helpers import rl_trees
from helpers.engine import Corpus

from minimind_mcore.rl.config.load import resolve
from minimind_mcore.rl.runtime import trainer
from minimind_mcore.rl.runtime.rollouts import Position
from minimind_mcore.rl.runtime.sharding import Division
from minimind_mcore.rl.runtime.supervise import Lost, Restarts
from minimind_mcore.rl.runtime.workers.manager import ManagerLost, Scored

STEPS, BATCH = 4, 4
PPO = {
    "rl_config": {"adv_estimator": "gae", "critic_resource": {"num_npus": 1}},
    "minimind": {"algorithm": "ppo"},
    "critic_config": {"model": "minimind3_tiny", "micro_batch_size": 4, "lr": 1e-3},
}
RUNS: dict[str, dict[str, Any]] = {"grpo": {}, "ppo": PPO, "ahead": {"rl_config": {"blocking": False}}}


class Model:
    """A trained model: its weights are the steps and prompts that it was trained on."""

    division = Division(1, 1, 4, 4, 4, "token-mean", 1)

    def __init__(self, lost_at: int = 0) -> None:
        self.trained: list[tuple[int, int]] = []
        self.saved: list[tuple[int, int]] = []
        self.state: dict[str, Any] | None = None
        self.lost_at = lost_at

    def measure(self, shards: list[int], reference: bool = False) -> list[Any]:
        return []

    def update(self, shards: list[int], step: int, kl_coef: float | None = None) -> dict[str, float]:
        if step == self.lost_at:
            self.lost_at = 0
            raise Lost(["actor rank 0"], "died")
        self.trained.append((step, shards[0]))
        return {"rollout/logp_diff": 0.0}

    def weights(self, keep: bool = False) -> int:
        return len(self.trained)

    def save(self, iteration: int, consumed: int, state: dict[str, Any]) -> None:
        self.saved, self.state = list(self.trained), state


class Manager:
    """A rollout manager that dies at its `dies`-th call. It notes the steps, and of which weights they are."""

    def __init__(self, engines: Callable[[], int], dies: int) -> None:
        self.engines, self.dies = engines, dies
        self.calls, self.dead, self.written = 0, False, list[tuple[int, int]]()

    def _call(self) -> None:
        self.calls += 1
        self.dead |= self.calls == self.dies
        if self.dead:
            raise ManagerLost(["rollout manager"], "died")

    def replace(self, loss: Lost) -> None:
        assert self.dead
        self.dead = False

    def go_to(self, position: Position, state: dict[str, Any]) -> None:
        self._call()
        self.consumed = position.consumed

    def generate(self, step: int, ahead: int = 0) -> None:
        self._call()
        self.written.append((step, self.engines()))
        self.consumed += BATCH

    def shards(self, division: Division, step: int | None = None) -> list[int]:
        self._call()
        return [self.consumed]

    def ask(self, method: str, *arguments: Any) -> Any:
        self._call()
        return Scored({}, (1.0, 1.0), 0.1, {"consumed": self.consumed}, [], [])


class Groups:
    """`WorkerGroups` of models, engines and a manager that count."""

    def __init__(self, critic: bool, dies: int, rank_lost_at: int) -> None:
        self.actor, self.critic, self.reference = Model(rank_lost_at), Model() if critic else None, None
        self.engine_weights = -1
        self.rollout = SimpleNamespace(load=self.load, check=list)
        self.manager = Manager(lambda: self.engine_weights, dies)
        self.restarts = Restarts("training ranks", 1, print, lambda: None)
        self.cluster = SimpleNamespace(waiting=None)
        self.rows: list[int] = []

    def load(self, weights: int) -> Any:
        self.engine_weights = weights
        return SimpleNamespace(result=list)

    def training(self) -> list[Model]:
        return [model for model in (self.actor, self.critic) if model is not None]

    def start(self) -> dict[str, Any]:
        for model in self.training():
            model.trained = list(model.saved)
        return {"iteration": len(self.actor.saved), "state": self.actor.state}

    def finished(self, step: int) -> None:
        pass


@pytest.fixture
def rehearse(corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Groups]:
    """A run whose manager dies at a call, and whose actor loses a rank in the update of a step."""
    prompts = rl_trees.write_prompts(tmp_path / "prompts")

    def run(name: str, dies: int = 0, rank_lost_at: int = 0) -> Groups:
        tree = rl_trees.run_tree(corpus, prompts, tmp_path / "run")
        for section, values in RUNS[name].items():
            tree[section] = tree.get(section, {}) | values
        groups = Groups(name == "ppo", dies, rank_lost_at)
        history = SimpleNamespace(history=tmp_path / "none", step=lambda step, row: groups.rows.append(step))
        history.close, history.outcome = (lambda: None), str
        stop = SimpleNamespace(asked=False, later=contextlib.nullcontext, at_once=contextlib.nullcontext)
        for attribute, value in {"WorkerGroups": groups, "Log": history, "Stop": stop, "write_report": None}.items():
            monkeypatch.setattr(trainer, attribute, lambda *_, value=value: value)
        trainer.train(trainer.Trainer(resolve(tree)))
        return groups

    return run


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("rank_lost_at", [0, STEPS])
def test_a_manager_lost_at_any_call_neither_repeats_nor_skips_a_step(
    rehearse: Callable[..., Groups], name: str, rank_lost_at: int
) -> None:
    expected = [(step, step * BATCH) for step in range(1, STEPS + 1)]
    rows = [1, 2, 3, 3, 4] if rank_lost_at else [1, 2, 3, 4]  # the third again, from the checkpoint of the second
    calls = rehearse(name, rank_lost_at=rank_lost_at).manager.calls
    assert calls > 6 * STEPS
    for dies in range(calls + 1):
        groups = rehearse(name, dies, rank_lost_at)
        assert all(model.trained == model.saved == expected for model in groups.training()), dies
        assert groups.rows == rows, dies
        # The engines always have the weights of the step before.
        assert all(weights == step - 1 for step, weights in groups.manager.written), dies
