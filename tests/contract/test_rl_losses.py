"""Advantages, divergences and losses equal those of MindSpeed-RL's own code, where its sources are given by path."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import upstream_rl
from torch import Tensor

from minimind_mcore.rl.algorithms import advantages, kl, losses
from minimind_mcore.rl.algorithms.actor import actor_loss
from minimind_mcore.rl.algorithms.table import ALGORITHMS, Algorithm

ROWS, LENGTH, SAMPLES = 12, 9, 4


@pytest.fixture(scope="module")
def source() -> Iterator[upstream_rl.Source]:
    source = upstream_rl.source()
    yield source
    source.forget()


@pytest.fixture
def batch() -> dict[str, Tensor]:
    torch.manual_seed(3)
    lengths = torch.randint(1, LENGTH + 1, (ROWS,))
    lengths[0] = LENGTH
    draws = {name: torch.randn(ROWS, LENGTH) for name in ("old", "ref", "new", "values", "old_values")}
    return {
        "mask": (torch.arange(LENGTH) < lengths.unsqueeze(1)).float(),
        "lengths": lengths.unsqueeze(1),
        # two groups that differ, one that does not
        "scores": torch.tensor([1.0, 0, 0, 1, -0.5, 1, -1, -0.5, 1, 1, 1, 1]),
        "entropy": torch.rand(ROWS, LENGTH),
        **draws,
        "logp": (draws["old"] + 0.3 * draws["new"]),
    }


def test_group_norm(source: upstream_rl.Source, batch: dict[str, Tensor]) -> None:
    theirs, _ = source.module("trainer.utils.compute_utils").compute_group_norm_advantage_return(
        batch["scores"].unsqueeze(1), batch["mask"], batch["lengths"], SAMPLES
    )
    torch.testing.assert_close(advantages.group_norm(batch["scores"], batch["mask"], SAMPLES), theirs)


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.5), (1.0, 1.0), (1.0, 0.0)])
def test_gae(source: upstream_rl.Source, batch: dict[str, Tensor], gamma: float, lam: float) -> None:
    mask, values = batch["mask"], batch["values"] * batch["mask"]
    rewards = advantages.at_last_token(batch["scores"], mask)
    theirs, returns = source.module("trainer.utils.compute_utils").compute_gae_advantage_return(
        rewards, values, mask, gamma, lam
    )
    ours = advantages.gae(rewards, values, mask, gamma, lam)
    torch.testing.assert_close(ours[0], theirs * mask, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours[1], returns * mask, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["kl", "abs", "mse", "low_var_kl"])
@pytest.mark.parametrize("scale", [1.0, 40.0])  # the second reaches the clamps
def test_divergence(source: upstream_rl.Source, batch: dict[str, Tensor], kind: str, scale: float) -> None:
    theirs = source.module("utils.compute").compute_kl_penalty(batch["logp"] * scale, batch["ref"] * scale, kind)
    torch.testing.assert_close(kl.kl(batch["logp"] * scale, batch["ref"] * scale, kind), theirs)


def test_adaptive_coefficient(source: upstream_rl.Source) -> None:
    theirs = source.module("trainer.utils.compute_utils").AdaptiveKLController(0.01, 0.1, 1000)
    ours = kl.Controller(0.01, 0.1, 1000)
    for divergence in (0.5, 0.11, 0.1, 0.0):
        theirs.update(divergence, 64)
        ours.update(divergence, 64)
        assert ours.value == pytest.approx(theirs.value, rel=1e-12)


def both(batch: dict[str, Tensor], algorithm: Algorithm, theirs: Any, arguments: dict[str, Any]) -> None:
    """Loss, gradient and metrics of `actor_loss` against (loss, clipfrac, ppo_kl, kl, entropy) of `theirs`."""
    mask = batch["mask"]
    advantage = advantages.group_norm(batch["scores"], mask, SAMPLES)
    logp = [batch["logp"].clone().requires_grad_() for _ in range(2)]
    expected = theirs(
        old_log_prob=batch["old"], log_prob=logp[1], advantages=advantage, eos_mask=mask,
        entropy=batch["entropy"], entropy_coeff=0.01, **arguments,
    )  # fmt: skip
    loss, stats = actor_loss(
        algorithm, logp[0], advantage, mask,
        old_logp=batch["old"], ref_logp=batch["ref"], entropy=batch["entropy"], entropy_coef=0.01,
    )  # fmt: skip
    torch.testing.assert_close(loss, expected[0], rtol=1e-6, atol=1e-6)
    torch.autograd.backward([loss, expected[0]])
    torch.testing.assert_close(logp[0].grad, logp[1].grad, rtol=1e-6, atol=1e-7)
    names = ["actor/ppo_kl", "actor/entropy"]
    for name, value in zip(names, (expected[2], expected[-1]), strict=True):
        torch.testing.assert_close(stats[name], value.detach(), rtol=1e-5, atol=1e-6)
    if algorithm.aggregation == "token-mean":  # DAPO's clip fraction by answers compares a tensor with itself: 0
        torch.testing.assert_close(stats["actor/pg_clipfrac"], expected[1].detach(), rtol=1e-5, atol=1e-6)


def test_grpo_loss(source: upstream_rl.Source, batch: dict[str, Tensor]) -> None:
    theirs = source.module("models.loss.grpo_actor_loss_func").GRPOActorLossFunc._compute_grpo_policy_loss
    control = SimpleNamespace(value=0.01)
    arguments = {"ref_log_prob": batch["ref"], "cliprange": 0.2, "kl_ctrl": control, "kl_penalty": "low_var_kl"}
    # its fifth value is the entropy, its fourth the divergence
    both(batch, ALGORITHMS["grpo"], theirs, arguments)


@pytest.mark.parametrize("token_level", [True, False])
def test_dapo_loss(source: upstream_rl.Source, batch: dict[str, Tensor], token_level: bool) -> None:
    theirs = source.module("models.loss.dapo_actor_loss_func").DAPOActorLossFunc._compute_dapo_policy_loss
    arguments = {"clip_ratio_low": 0.2, "clip_ratio_high": 0.28, "token_level_loss": token_level}
    how = "token-mean" if token_level else "seq-mean-token-mean"
    both(batch, Algorithm(clip_high=0.28, kl="none", aggregation=how), theirs, arguments)


def test_ppo_loss(source: upstream_rl.Source, batch: dict[str, Tensor]) -> None:
    theirs = source.module("models.loss.ppo_actor_loss_func").PPOActorLossFunc._compute_ppo_policy_loss
    both(batch, ALGORITHMS["ppo"], theirs, {"cliprange": 0.2})


def test_value_loss(source: upstream_rl.Source, batch: dict[str, Tensor]) -> None:
    mask, returns = batch["mask"], batch["ref"]
    theirs, cut = source.module("models.loss.critic_loss_func").CriticLossFunc._compute_value_loss(
        batch["values"], returns, batch["old_values"], mask, 0.5
    )
    loss, stats = losses.value_loss(batch["values"], batch["old_values"], returns, mask, 0.5)
    torch.testing.assert_close(losses.aggregate(loss, mask), theirs, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(stats["critic/vf_clipfrac"], cut, rtol=1e-5, atol=1e-6)
