"""Losses equal TRL's GRPOTrainer's own `_compute_loss`, called on given log-probabilities; 1e-6."""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from minimind_mcore.rl.algorithms import advantages
from minimind_mcore.rl.algorithms.actor import actor_loss
from minimind_mcore.rl.algorithms.table import ALGORITHMS, Algorithm

trl = pytest.importorskip("trl", reason="TRL is not installed (it wants Python 3.11)")
ROWS, LENGTH, ROOM = 6, 8, 16
BETA, LOW, HIGH, CAP = 0.04, 0.2, 0.28, 2.0


@pytest.fixture
def batch() -> dict[str, Tensor]:
    torch.manual_seed(5)
    old = torch.randn(ROWS, LENGTH, dtype=torch.float64)
    draw = {name: torch.randn(ROWS, LENGTH, dtype=torch.float64) for name in ("new", "ref", "rollout", "entropy")}
    mask = (torch.arange(LENGTH) < torch.randint(2, LENGTH + 1, (ROWS, 1))).double()
    mask[1, 1] = 0  # a tool's token
    scores = torch.randn(ROWS, dtype=torch.float64)
    draw["ref"] = old + 0.3 * draw["ref"]  # near enough for the clamp of k3, which TRL has not
    return draw | {"old": old, "logp": old + 0.3 * draw["new"], "mask": mask, "advantages": scores}


ACCELERATOR = SimpleNamespace(
    num_processes=1,
    gather=lambda values: values,
    gather_for_metrics=lambda values: values,
    reduce=lambda values, *_, **__: values,
    sync_gradients=True,
)


def trl_loss(
    batch: dict[str, Tensor],
    logp: Tensor,
    loss_type: str,
    beta: float,
    corrected: bool,
    level: str = "token",
    delta: float | None = None,
) -> Tensor:
    """Of the real method; the trainer around it is reduced to what the method reads."""
    trainer: Any = SimpleNamespace(
        loss_type=loss_type, beta=beta, epsilon_low=LOW, epsilon_high=5.0 if loss_type == "cispo" else HIGH,
        importance_sampling_level=level, top_entropy_quantile=1.0, off_policy_mask_threshold=None,
        args=SimpleNamespace(delta=delta, use_bias_correction_kl=False, steps_per_generation=1),
        use_vllm=corrected, vllm_importance_sampling_correction=corrected, aux_loss_enabled=False,
        model=SimpleNamespace(training=True), current_gradient_accumulation_steps=1, accelerator=ACCELERATOR,
        max_completion_length=ROOM, _entropy_bonus_enabled=True, use_adaptive_entropy=False, entropy_coef=0.01,
        _metrics=defaultdict(lambda: defaultdict(list)),
        _get_per_token_logps_and_entropies=lambda *_, **__: (logp, batch["entropy"], None),
    )  # fmt: skip
    tokens = torch.zeros(ROWS, LENGTH, dtype=torch.long)
    inputs = {
        "prompt_ids": tokens, "prompt_mask": tokens, "completion_ids": tokens, "completion_mask": batch["mask"],
        "advantages": batch["advantages"], "old_per_token_logps": batch["old"], "ref_per_token_logps": batch["ref"],
        "importance_sampling_ratio": (batch["old"] - batch["rollout"]).exp().clamp(max=CAP),
        "num_items_in_batch": batch["mask"].sum(),
    }  # fmt: skip
    loss: Tensor = trl.GRPOTrainer._compute_loss(trainer, None, inputs)
    return loss


@pytest.mark.parametrize(
    ("loss_type", "ours"),
    [
        ("grpo", Algorithm(clip_high=HIGH, aggregation="seq-mean-token-mean")),
        ("bnpo", Algorithm(clip_high=HIGH)),
        ("dapo", Algorithm(clip_high=HIGH)),
        ("dr_grpo", Algorithm(clip_high=HIGH, aggregation="seq-mean-token-sum-norm")),
        ("cispo", Algorithm(loss="cispo", clip_high=5.0)),
    ],
)
@pytest.mark.parametrize("beta", [0.0, BETA])
@pytest.mark.parametrize("corrected", [False, True])
def test_loss_and_gradient_equal_trl(
    batch: dict[str, Tensor], loss_type: str, ours: Algorithm, beta: float, corrected: bool
) -> None:
    logp = [batch["logp"].clone().requires_grad_() for _ in range(2)]
    expected = trl_loss(batch, logp[0], loss_type, beta, corrected)
    loss, _ = actor_loss(
        ours, logp[1], batch["advantages"].unsqueeze(1).expand(-1, LENGTH), batch["mask"], old_logp=batch["old"],
        ref_logp=batch["ref"], entropy=batch["entropy"], entropy_coef=0.01, kl_coef=beta, length=ROOM,
        rollout_logp=batch["rollout"], tis_cap=CAP if corrected else None,
    )  # fmt: skip
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)
    torch.autograd.backward([loss, expected])
    torch.testing.assert_close(logp[1].grad, logp[0].grad, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("beta", [0.0, BETA])
@pytest.mark.parametrize(
    ("level", "delta", "ours"),
    [
        ("sequence", None, Algorithm(loss="gspo", clip_high=HIGH, aggregation="seq-mean-token-mean")),
        ("token", 1.5, Algorithm(clip_high=HIGH, dual_clip=1.5, aggregation="seq-mean-token-mean")),
    ],
)
def test_ratios_of_responses_and_the_dual_clip_equal_trl(
    batch: dict[str, Tensor], level: str, delta: float | None, ours: Algorithm, beta: float
) -> None:
    logp = [batch["logp"].clone().requires_grad_() for _ in range(2)]
    expected = trl_loss(batch, logp[0], "grpo", beta, False, level, delta)
    loss, stats = actor_loss(
        ours, logp[1], batch["advantages"].unsqueeze(1).expand(-1, LENGTH), batch["mask"], old_logp=batch["old"],
        ref_logp=batch["ref"], entropy=batch["entropy"], entropy_coef=0.01, kl_coef=beta,
    )  # fmt: skip
    assert stats["actor/pg_clipfrac"] > 0 and stats.get("actor/pg_clipfrac_lower", 1) > 0
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)
    torch.autograd.backward([loss, expected])
    torch.testing.assert_close(logp[1].grad, logp[0].grad, rtol=1e-6, atol=1e-8)


def test_the_loss_of_rloo_equals_trl_s_at_the_first_update(batch: dict[str, Tensor]) -> None:
    """Later updates differ: TRL clips the ratio of the whole response, this kit (as verl) that of each token."""
    logp = [batch["old"].clone().requires_grad_() for _ in range(2)]
    trainer: Any = SimpleNamespace(
        epsilon_low=LOW, epsilon_high=LOW, aux_loss_enabled=False, model=SimpleNamespace(training=True),
        accelerator=ACCELERATOR, _metrics=defaultdict(lambda: defaultdict(list)),
        _get_per_token_logps_and_entropies=lambda *_, **__: (logp[0], batch["entropy"], None),
    )  # fmt: skip
    tokens = torch.zeros(ROWS, LENGTH, dtype=torch.long)
    inputs = {
        "prompt_ids": tokens, "prompt_mask": tokens, "completion_ids": tokens, "completion_mask": batch["mask"],
        "advantages": batch["advantages"], "old_logps": (batch["old"] * batch["mask"]).sum(1),
    }  # fmt: skip
    trl.RLOOTrainer._compute_loss(trainer, None, inputs).backward()
    spread = batch["advantages"].unsqueeze(1).expand(-1, LENGTH)
    actor_loss(ALGORITHMS["rloo"], logp[1], spread, batch["mask"], old_logp=batch["old"])[0].backward()  # type: ignore[no-untyped-call]
    torch.testing.assert_close(logp[1].grad, logp[0].grad, rtol=1e-6, atol=1e-8)


def test_advantages_equal_trl() -> None:
    """TRL's deviation (`nanstd`) with its epsilon of 1e-4; a group without a difference among them."""
    from trl.trainer.utils import nanstd

    rewards = torch.tensor([1.0, 0, 0, 1, 0.3, 0.3, 0.3, 0.3, -2, 5, 0.1, 0.2], dtype=torch.float64)
    centred = (rewards.view(-1, 4) - rewards.view(-1, 4).mean(1, keepdim=True)).view(-1)
    spread = nanstd(rewards.view(-1, 4), dim=1).repeat_interleave(4)
    mask = torch.ones(12, 1)
    torch.testing.assert_close(
        advantages.group_norm(rewards, mask, 4, spread="none")[:, 0].double(), centred, rtol=1e-6, atol=1e-6
    )
    expected = centred / (spread + 1e-4)
    found = advantages.group_norm(rewards, mask, 4)[:, 0].double() * (spread + 1e-6) / (spread + 1e-4)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
