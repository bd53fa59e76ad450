"""Losses and advantages equal those of verl's own code. VERL_HOME holds verl 0.9.1's folder `verl`."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from minimind_mcore.rl.algorithms import advantages
from minimind_mcore.rl.algorithms.actor import actor_loss
from minimind_mcore.rl.algorithms.table import ALGORITHMS, Algorithm

ROWS, LENGTH, SAMPLES = 12, 9, 4


class Settings(SimpleNamespace):
    """verl's ActorConfig, as far as its losses read it."""

    def get(self, name: str, default: Any) -> Any:
        return getattr(self, name, default)


@pytest.fixture
def verl(monkeypatch: pytest.MonkeyPatch) -> Any:
    """verl's trainer/ppo/core_algos.py; packages that it only imports are stand-ins."""
    home = os.environ.get("VERL_HOME")
    if not home:
        pytest.skip("VERL_HOME is not set: no sources of verl")

    def stand_in(name: str, **content: Any) -> None:
        module = ModuleType(name)
        module.__dict__.update(content, __path__=[])
        monkeypatch.setitem(sys.modules, name, module)

    def real(name: str) -> Any:
        path = Path(home, *name.split(".")).with_suffix(".py")
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec and spec.loader
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, module)
        spec.loader.exec_module(module)
        return module

    for name in ("verl", "verl.trainer", "verl.trainer.ppo", "verl.workers"):
        stand_in(name)
    stand_in("tensordict", TensorDict=dict)
    stand_in("verl.utils", as_torch_index=None, group_mean_std=None)
    stand_in("verl.utils.device", get_device_name=None, get_torch_device=None)
    stand_in("verl.utils.import_utils", deprecated=lambda *_: lambda function: function)
    stand_in("verl.trainer.config", AlgoConfig=dict)
    stand_in("verl.workers.config", ActorConfig=Settings)
    sys.modules["verl.utils"].torch_functional = real("verl.utils.torch_functional")  # type: ignore[attr-defined]
    return real("verl.trainer.ppo.core_algos")


@pytest.fixture
def batch() -> dict[str, Tensor]:
    torch.manual_seed(4)
    mask = (torch.arange(LENGTH) < torch.randint(1, LENGTH + 1, (ROWS, 1))).float()
    old, advantage = torch.randn(ROWS, LENGTH), torch.randn(ROWS, 1).expand(-1, LENGTH).clone()
    advantage[0] = -1
    logp = old + 0.5 * torch.randn(ROWS, LENGTH)
    logp[:2, 0] += 30  # beyond the clamp of the log-ratio
    return {"mask": mask, "old": old, "logp": logp, "advantages": advantage, "scores": torch.randn(ROWS)}


@pytest.mark.parametrize("dual", [3.0, 1e9])
@pytest.mark.parametrize("name", ["grpo", "dapo", "gspo", "rloo", "reinforce_plus_plus", "cispo"])
def test_loss_and_gradient(verl: Any, batch: dict[str, Tensor], name: str, dual: float) -> None:
    chosen = ALGORITHMS[name]
    cispo = chosen.loss == "cispo"
    settings = Settings(
        clip_ratio=0.2, clip_ratio_c=dual, global_batch_info={}, clip_ratio_low=1.0 if cispo else chosen.clip_low,
        clip_ratio_high=chosen.clip_high - 1 if cispo else chosen.clip_high,
    )  # fmt: skip
    logp = [batch["logp"].clone().requires_grad_() for _ in range(2)]
    theirs = verl.get_policy_loss_fn({"clip": "vanilla"}.get(chosen.loss, chosen.loss))
    expected, metrics = theirs(
        batch["old"], logp[0], batch["advantages"], batch["mask"], loss_agg_mode=chosen.aggregation, config=settings
    )
    ours = Algorithm(
        loss=chosen.loss, clip_low=chosen.clip_low, clip_high=chosen.clip_high, aggregation=chosen.aggregation,
        dual_clip=dual if chosen.loss == "clip" else None, kl="none",
    )  # fmt: skip
    loss, stats = actor_loss(ours, logp[1], batch["advantages"], batch["mask"], old_logp=batch["old"])
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)
    torch.autograd.backward([loss, expected])
    torch.testing.assert_close(logp[1].grad, logp[0].grad, rtol=1e-6, atol=1e-7)
    assert stats["actor/pg_clipfrac"].item() == pytest.approx(metrics["actor/pg_clipfrac"])
    if chosen.loss == "clip":
        assert stats["actor/pg_clipfrac_lower"].item() == pytest.approx(metrics["actor/pg_clipfrac_lower"])
        assert dual > 3 or stats["actor/pg_clipfrac_lower"] > 0


@pytest.mark.parametrize("name", ["rloo", "reinforce_plus_plus_baseline", "reinforce_plus_plus"])
@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_advantages(verl: Any, batch: dict[str, Tensor], name: str, gamma: float) -> None:
    mask, scores = batch["mask"], batch["scores"]
    rewards = advantages.at_last_token(scores, mask)
    if name == "reinforce_plus_plus":  # with the KL term in the rewards of the tokens
        rewards = rewards - 0.1 * torch.randn(ROWS, LENGTH) * mask
    index = np.repeat(np.arange(ROWS // SAMPLES), SAMPLES)
    theirs = verl.get_adv_estimator_fn(name)
    expected, _ = theirs(rewards.clone(), response_mask=mask, index=index, config=SimpleNamespace(gamma=gamma))
    chosen = ALGORITHMS[name].advantage
    if chosen == "returns":
        found, _ = advantages.gae(rewards, torch.zeros_like(mask), mask, gamma, 1.0)
    else:
        found = advantages.ADVANTAGES[chosen](scores, mask, SAMPLES, spread="none")
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
