"""Compute the advantages of a batch from its rewards, and keep the algorithm's state between steps."""

from __future__ import annotations

from typing import Any

import torch

from minimind_mcore.rl.algorithms.advantages import ADVANTAGES, Baseline, at_last_token, gae
from minimind_mcore.rl.algorithms.kl import Controller, in_reward, kl
from minimind_mcore.rl.algorithms.masked import masked_mean, require_shape
from minimind_mcore.rl.algorithms.table import Algorithm
from minimind_mcore.rl.config.schema import Config
from minimind_mcore.rl.registry import lookup
from minimind_mcore.rl.runtime.batch import Batch
from minimind_mcore.rl.runtime.metrics import Row


class Advantages:
    """Computes the advantages of each step's batch.

    Args:
        config: configuration of the run.
        algorithm: the run's algorithm.
    """

    def __init__(self, config: Config, algorithm: Algorithm) -> None:
        self.rl, self.algorithm = config.rl, algorithm
        adaptive = config.rl.kl_ctrl_type == "adaptive"
        self.controller = Controller(
            algorithm.kl_coef, config.rl.kl_target if adaptive else None, float(config.rl.kl_horizon)
        )
        low, high = config.minimind.spo_rho
        self.baseline = Baseline(half_life=config.minimind.spo_half_life, low=low, high=high)

    @property
    def kl_coef(self) -> float:
        """The current coefficient of the KL term."""
        return self.controller.value

    def fill(self, batch: Batch) -> Row:
        """Set `advantages` (and `returns`) of a batch from its rewards, and return metrics.

        Rows that only fill the step (`batch.taught` is 0) get advantage 0, and the whitening leaves them out.
        """
        assert batch.rewards is not None
        rl, chosen, mask, rewards, metrics = self.rl, self.algorithm, batch.loss_mask, batch.rewards, dict[str, float]()
        logp = batch.rollout_logp if batch.old_logp is None else batch.old_logp
        divergence = None
        if chosen.kl == "reward":
            assert batch.ref_logp is not None and logp is not None
            divergence = kl(logp, batch.ref_logp, chosen.kl_kind)
        if chosen.advantage in ("gae", "returns"):
            rewards = at_last_token(rewards, mask)
            if divergence is not None:
                rewards = in_reward(rewards, divergence, mask, self.kl_coef)
            # Without a critic all values are 0 and lambda is 1, so that the advantage equals the return.
            values, lam = torch.zeros_like(mask), 1.0
            if chosen.advantage == "gae":
                assert batch.values is not None
                values, lam = batch.values, rl.lam
                metrics["critic/values/mean"] = masked_mean(values, mask).item()
            batch.advantages, batch.returns = gae(rewards, values, mask, rl.gamma, lam, rl.advantage_whiten)
            metrics["critic/returns/mean"] = masked_mean(batch.returns, mask).item()
        elif chosen.advantage == "baseline":
            assert logp is not None
            metrics["spo/baseline"] = self.baseline.value
            batch.advantages = self.baseline.advantages(rewards, mask)
            metrics["spo/rho"] = self.baseline.update(rewards.mean().item(), masked_mean(logp, batch.mask).item())
        else:
            if divergence is not None:
                rewards = rewards - self.kl_coef * (divergence * mask).sum(1)
            advantage = lookup(chosen.advantage, ADVANTAGES, "minimind.advantage")
            batch.advantages = advantage(rewards, mask, rl.n_samples_per_prompt, spread=chosen.spread)
            require_shape(batch.advantages, mask, f"minimind.advantage: {chosen.advantage}")
        if batch.taught is not None:  # a user's function may ignore the mask
            batch.advantages = batch.advantages * batch.taught[:, None]
        if divergence is not None:
            metrics["actor/reward_kl"] = masked_mean(divergence, batch.mask).item()
            self.controller.update(masked_mean(divergence, batch.mask, dim=1).mean().item(), len(batch))
        return metrics

    def state_dict(self) -> dict[str, Any]:
        """Return the state that a resumed run needs."""
        return {"controller": self.controller.state_dict(), "baseline": self.baseline.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state of `state_dict`. An empty state changes nothing."""
        if state:
            self.controller.load_state_dict(state["controller"])
            self.baseline.load_state_dict(state["baseline"])
