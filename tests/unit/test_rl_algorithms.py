"""Advantages, divergences and losses equal their formulas, written here once more in numpy, token by token."""

from __future__ import annotations

import dataclasses
import math
import sys
from types import ModuleType

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from minimind_mcore.errors import UserError
from minimind_mcore.rl.algorithms import advantages, batches, groups, kl, losses, masked
from minimind_mcore.rl.algorithms.actor import actor_loss
from minimind_mcore.rl.algorithms.table import ALGORITHMS, Algorithm, algorithm
from minimind_mcore.rl.runtime.vocab_parallel import log_probs_and_entropy

ROWS, LENGTH, SAMPLES = 12, 7, 4
Array = NDArray[np.float64]


@pytest.fixture(params=[0, 1])
def draw(request: pytest.FixtureRequest) -> dict[str, Tensor]:
    """A batch in float64: answers of every length, one of them without tokens, a tool's turn in another."""
    torch.manual_seed(request.param)
    lengths = torch.randint(1, LENGTH + 1, (ROWS,))
    mask = (torch.arange(LENGTH) < lengths.unsqueeze(1)).double()
    mask[3] = 0
    mask[4] = torch.tensor([1, 1, 0, 0, 1, 1, 0])
    names = ("logp", "old", "ref", "rollout", "advantages", "values", "old_values", "rewards", "entropy")
    drawn = {name: torch.randn(ROWS, LENGTH, dtype=torch.float64) for name in names}
    drawn["logp"] = drawn["old"] + 0.3 * drawn["logp"]
    return drawn | {"mask": mask, "scores": torch.randn(ROWS).round(decimals=1)}


def numbers(tensors: dict[str, Tensor]) -> dict[str, Array]:
    return {name: tensor.double().numpy() for name, tensor in tensors.items()}


def close(ours: Tensor, theirs: Array | float, tolerance: float = 1e-6) -> None:
    np.testing.assert_allclose(ours.detach().numpy(), theirs, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("spread", "ddof", "eps"), [("unbiased", 1, 1e-6), ("biased", 0, 1e-4), ("none", 0, 0.0)])
def test_group_advantages(draw: dict[str, Tensor], spread: advantages.Spread, ddof: int, eps: float) -> None:
    scores = draw["scores"].double().numpy().copy()
    scores[:SAMPLES] = 0.3  # a group without a difference
    expected = np.zeros((ROWS, LENGTH))
    for start in range(0, ROWS, SAMPLES):
        group = scores[start : start + SAMPLES]
        divisor = 1.0 if spread == "none" else group.std(ddof=ddof) + eps
        expected[start : start + SAMPLES] = ((group - group.mean()) / divisor)[:, None]
    expected *= draw["mask"].numpy()
    ours = advantages.group_norm(torch.from_numpy(scores), draw["mask"], SAMPLES, spread=spread)
    close(ours, expected)
    assert not ours[:SAMPLES].any()


def test_leave_one_out_and_batch_advantages(draw: dict[str, Tensor]) -> None:
    """RLOO, and REINFORCE++ with a baseline: sums over the other samples, and over every token of the batch."""
    scores, mask = draw["scores"].double().numpy(), draw["mask"].numpy()
    others, centred = np.zeros(ROWS), np.zeros(ROWS)
    for row in range(ROWS):
        group = [*range(row // SAMPLES * SAMPLES, (row // SAMPLES + 1) * SAMPLES)]
        others[row] = scores[row] - np.mean([scores[other] for other in group if other != row])
        centred[row] = scores[row] - scores[group].mean()
    close(advantages.leave_one_out(draw["scores"], draw["mask"], SAMPLES), others[:, None] * mask)
    tokens = np.repeat(centred, mask.sum(1).astype(int))
    expected = (centred - tokens.mean()) / np.sqrt(tokens.var(ddof=1) + 1e-8)
    close(advantages.batch_norm(draw["scores"], draw["mask"], SAMPLES), expected[:, None] * mask)


@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_returns_without_a_critic_are_sums_of_what_follows(draw: dict[str, Tensor], gamma: float) -> None:
    """REINFORCE++: A_t is the discounted sum of the rewards from t on, whitened over the batch."""
    data = numbers(draw)
    expected = np.zeros((ROWS, LENGTH))
    for row in range(ROWS):
        places = np.flatnonzero(data["mask"][row])
        for index, place in enumerate(places):
            later = data["rewards"][row, places[index:]]
            expected[row, place] = (gamma ** np.arange(len(later)) * later).sum()
    inside = data["mask"] == 1
    kept = expected[inside]
    expected[inside] = (kept - kept.mean()) / np.sqrt(kept.var(ddof=1) + 1e-8)
    close(advantages.gae(draw["rewards"], 0 * draw["values"], draw["mask"], gamma, 1.0)[0], expected)


def test_one_sample_per_prompt_has_no_advantage() -> None:
    mask = torch.ones(3, 2)
    for spread in ("unbiased", "biased", "none"):
        assert not advantages.group_norm(torch.tensor([1.0, 2.0, 3.0]), mask, 1, spread=spread).any()


@pytest.mark.parametrize("whitened", [True, False])
def test_gae(draw: dict[str, Tensor], whitened: bool) -> None:
    gamma, lam = 0.97, 0.9
    data = numbers(draw)
    expected, returns = np.zeros((ROWS, LENGTH)), np.zeros((ROWS, LENGTH))
    for row in range(ROWS):
        places = np.flatnonzero(data["mask"][row])  # a tool's tokens are stepped over
        for index, place in enumerate(places):
            # the sum itself: (gamma lam)^k delta of each later token
            for k, later in enumerate(places[index:]):
                after = data["values"][row, places[index + k + 1]] if index + k + 1 < len(places) else 0.0
                delta = data["rewards"][row, later] + gamma * after - data["values"][row, later]
                expected[row, place] += (gamma * lam) ** k * delta
            returns[row, place] = expected[row, place] + data["values"][row, place]
    inside = data["mask"] == 1
    if whitened:
        kept = expected[inside]
        expected[inside] = (kept - kept.mean()) / np.sqrt(kept.var(ddof=1) + 1e-8)
    ours = advantages.gae(draw["rewards"], draw["values"], draw["mask"], gamma, lam, whitened)
    close(ours[0], expected)
    close(ours[1], returns)


def test_reward_stands_on_the_last_token(draw: dict[str, Tensor]) -> None:
    placed = advantages.at_last_token(draw["scores"], draw["mask"])
    for row in range(ROWS):
        places = np.flatnonzero(draw["mask"][row].numpy())
        assert placed[row].nonzero().flatten().tolist() == (places[-1:].tolist() if draw["scores"][row] else [])
        assert placed[row].sum() == (draw["scores"][row] if len(places) else 0)


@pytest.mark.parametrize(
    ("names", "formula"),
    [
        (("k1", "kl"), lambda d: d),
        (("k2", "mse"), lambda d: d**2 / 2),
        (("k3", "low_var_kl"), lambda d: np.clip(np.exp(np.clip(-d, -20, 20)) - np.clip(-d, -20, 20) - 1, -10, 10)),
        (("abs",), np.abs),
    ],
)
def test_divergences(draw: dict[str, Tensor], names: tuple[str, ...], formula: object) -> None:
    for scale in (1, 30):  # the second is beyond the clamps
        logp, ref = draw["logp"] * scale, draw["ref"] * scale
        for name in names:
            close(kl.kl(logp, ref, name), formula((logp - ref).numpy()))  # type: ignore[operator]


def test_unknown_divergence_names_the_nearest() -> None:
    with pytest.raises(UserError, match="low_var_kl"):
        kl.kl(torch.zeros(1, 1), torch.zeros(1, 1), "low_var")


def test_divergence_in_the_reward_and_its_controller(draw: dict[str, Tensor]) -> None:
    divergence = kl.kl(draw["logp"], draw["ref"], "kl")
    penalised = kl.in_reward(draw["rewards"], divergence, draw["mask"], 0.1)
    data = numbers(draw)
    mean = masked.masked_mean(divergence, draw["mask"], dim=1).mean()
    gap = (data["logp"] - data["ref"]) * data["mask"]
    close(penalised, data["rewards"] - 0.1 * gap)
    close(mean, (gap.sum(1) / np.maximum(data["mask"].sum(1), 1)).mean())
    fixed, moved = kl.Controller(0.1), kl.Controller(0.1, target=0.05, horizon=100)
    for value, factor in ((1.0, 1 + 0.2 * 10 / 100), (0.0, 1 - 0.2 * 10 / 100), (0.055, 1 + 0.1 * 10 / 100)):
        before = moved.value
        moved.update(value, 10)
        fixed.update(value, 10)
        assert moved.value == pytest.approx(before * factor)
    assert fixed.value == 0.1
    resumed = kl.Controller(1.0, target=0.05, horizon=100)
    resumed.load_state_dict(moved.state_dict())
    assert resumed == moved


def token_loss(kind: str, ratio: float, logp: float, advantage: float, low: float, high: float) -> float:
    if kind == "clip":
        return max(-advantage * ratio, -advantage * min(max(ratio, 1 - low), 1 + high))
    return -advantage * logp * (min(ratio, high) if kind == "cispo" else 1.0)


@pytest.mark.parametrize(("kind", "low", "high"), [("clip", 0.2, 0.2), ("clip", 0.2, 0.28), ("cispo", 0.0, 1.1),
                                                   ("reinforce", 0.0, 0.0)])  # fmt: skip
@pytest.mark.parametrize("cap", [None, 1.5])
def test_policy_loss(draw: dict[str, Tensor], kind: str, low: float, high: float, cap: float | None) -> None:
    data = numbers(draw)
    ours, stats = losses.policy_loss(
        draw["logp"], draw["old"], draw["advantages"], draw["mask"],
        kind=kind, clip_low=low, clip_high=high, rollout_logp=draw["rollout"], tis_cap=cap,
    )  # fmt: skip
    expected = np.zeros((ROWS, LENGTH))
    for row, place in np.ndindex(ROWS, LENGTH):
        ratio = math.exp(data["logp"][row, place] - data["old"][row, place])
        weight = 1.0 if cap is None else min(math.exp(data["old"][row, place] - data["rollout"][row, place]), cap)
        logp, advantage = float(data["logp"][row, place]), float(data["advantages"][row, place])
        loss = token_loss(kind, ratio, logp, advantage, low, high)
        expected[row, place] = weight * loss
    close(ours, expected)
    close(stats["actor/ppo_kl"], ((data["old"] - data["logp"]) * data["mask"]).sum() / data["mask"].sum())
    assert ("actor/tis_weight" in stats) == (cap is not None)


def test_gspo_clips_the_ratio_of_the_response(draw: dict[str, Tensor]) -> None:
    """Mean over responses of max(-A s, -A clip(s)) with s = (pi / pi_old)^(1 / length), and its gradient by hand."""
    data, mask = numbers(draw), draw["mask"].numpy()
    low, high, total, gradient = 0.1, 0.15, 0.0, np.zeros((ROWS, LENGTH))
    cut = np.zeros(ROWS, bool)
    for row in range(ROWS):
        length, advantage = mask[row].sum(), data["scores"][row]
        if not length:
            continue
        s = math.exp(((data["logp"] - data["old"])[row] * mask[row]).sum() / length)
        plain, clipped = -advantage * s, -advantage * min(max(s, 1 - low), 1 + high)
        cut[row] = clipped > plain
        total += max(plain, clipped) / ROWS
        gradient[row] = 0 if cut[row] else plain / length / ROWS * mask[row]
    logp = draw["logp"].clone().requires_grad_()
    chosen = Algorithm(loss="gspo", clip_low=low, clip_high=high, aggregation="seq-mean-token-mean", kl="none")
    spread = draw["scores"].double().unsqueeze(1).expand(-1, LENGTH)
    loss, stats = actor_loss(chosen, logp, spread, draw["mask"], old_logp=draw["old"])
    close(loss, total)
    loss.backward()  # type: ignore[no-untyped-call]
    assert logp.grad is not None and cut.any() and not cut.all()
    close(logp.grad, gradient)
    close(stats["actor/pg_clipfrac"], (cut[:, None] * mask).sum() / mask.sum())


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient"),
    [
        (5.0, -2.0, 6.0, 0.0),  # A c, with c = 3
        (2.0, -2.0, 4.0, 4.0),
        (5.0, 2.0, -2.4, 0.0),  # the upper clip, as without a dual clip
        (0.5, -2.0, 1.6, 0.0),
    ],
)
def test_the_dual_clip_limits_tokens_with_a_negative_advantage(
    ratio: float, advantage: float, loss: float, gradient: float
) -> None:
    ones = torch.ones(1, 1, dtype=torch.float64)
    logp = (ones * math.log(ratio)).requires_grad_()
    found, stats = losses.policy_loss(logp, 0 * ones, advantage * ones, ones, dual_clip=3.0)
    found.sum().backward()  # type: ignore[no-untyped-call]
    assert logp.grad is not None
    assert (found.item(), logp.grad.item()) == (pytest.approx(loss), pytest.approx(gradient))
    assert stats["actor/pg_clipfrac_lower"].item() == float(loss == 6.0)


@pytest.mark.parametrize(("kind", "bound"), [("clip", math.exp(20)), ("gspo", math.exp(20))])
def test_a_log_ratio_of_hundreds_gives_a_finite_loss(kind: str, bound: float) -> None:
    ones = torch.ones(1, 2)
    logp = (500 * ones).requires_grad_()
    loss, _ = losses.policy_loss(
        logp, 0 * ones, -ones, ones, kind=kind, rollout_logp=-900 * ones, tis_cap=math.inf if kind == "clip" else None
    )
    assert loss[0, 0].item() == pytest.approx(bound**2 if kind == "clip" else bound, rel=1e-4)
    loss.sum().backward()  # type: ignore[no-untyped-call]
    assert logp.grad is not None and logp.grad.isfinite().all()


def test_a_loss_of_the_user_s_has_one_value_per_token(draw: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("my_losses")
    module.scalar = lambda logp, *_, **__: (logp.mean(), logp > 0)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "my_losses", module)
    tensors = [draw[name] for name in ("logp", "old", "advantages", "mask")]
    with pytest.raises(UserError, match=r"my_losses:scalar: found a result of shape \[\], expected \[12, 7\]"):
        losses.policy_loss(*tensors, kind="my_losses:scalar")


@pytest.mark.parametrize(
    ("ratio", "advantage", "gradient", "cut"),
    [
        (1.25, 1.0, 0.0, True),  # already better than allowed
        (1.25, -1.0, 1.25, False),
        (0.75, 1.0, -0.75, False),
        (0.75, -1.0, 0.0, True),  # already worse than allowed
        (1.1, 1.0, -1.1, False),
        (0.9, -1.0, 0.9, False),
    ],
)
def test_clipping_edges(ratio: float, advantage: float, gradient: float, cut: bool) -> None:
    logp = torch.full((1, 1), math.log(ratio), dtype=torch.float64, requires_grad=True)
    ones = torch.ones(1, 1, dtype=torch.float64)
    loss, stats = losses.policy_loss(logp, 0 * ones, advantage * ones, ones)
    loss.sum().backward()  # type: ignore[no-untyped-call]
    assert logp.grad is not None
    assert logp.grad.item() == pytest.approx(gradient)
    assert stats["actor/pg_clipfrac"].item() == float(cut)


def test_cispo_keeps_the_gradient_of_clipped_tokens() -> None:
    logp = torch.full((1, 1), math.log(8.0), requires_grad=True)
    loss, _ = losses.policy_loss(logp, torch.zeros(1, 1), torch.ones(1, 1), torch.ones(1, 1), kind="cispo", clip_high=5)
    loss.sum().backward()  # type: ignore[no-untyped-call]
    assert logp.grad is not None
    assert logp.grad.item() == pytest.approx(-5.0)


def test_first_update_needs_no_old_logp(draw: dict[str, Tensor]) -> None:
    for name in ALGORITHMS:
        kind = ALGORITHMS[name].loss
        grads = []
        for old in (None, draw["logp"].clone()):
            logp = draw["logp"].clone().requires_grad_()
            losses.policy_loss(logp, old, draw["advantages"], draw["mask"], kind=kind)[0].sum().backward()  # type: ignore[no-untyped-call]
            grads.append(logp.grad)
        torch.testing.assert_close(*grads)


AGGREGATIONS: list[losses.Aggregation] = [
    "token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm",
]  # fmt: skip


@pytest.mark.parametrize("how", AGGREGATIONS)
def test_aggregation(draw: dict[str, Tensor], how: losses.Aggregation) -> None:
    data = numbers(draw)
    sums = (data["rewards"] * data["mask"]).sum(1)
    counts = data["mask"].sum(1)
    expected = {
        "token-mean": sums.sum() / counts.sum(),
        "seq-mean-token-mean": np.mean([s / c if c else 0.0 for s, c in zip(sums, counts, strict=True)]),
        "seq-mean-token-sum": sums.mean(),
        "seq-mean-token-sum-norm": sums.mean() / 16,
    }[how]
    outside = torch.where(draw["mask"].bool(), draw["rewards"], torch.nan)  # what is masked may be anything
    close(losses.aggregate(outside, draw["mask"], how, length=16), expected)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_parts_of_a_batch_sum_to_the_whole(draw: dict[str, Tensor], name: str) -> None:
    """However a mini-batch is cut into micro-batches and ranks, its loss is the same."""
    chosen = ALGORITHMS[name]

    def loss(rows: slice, total: Tensor | None) -> Tensor:
        part = {key: value[rows] for key, value in draw.items()}
        return actor_loss(
            chosen, part["logp"], part["advantages"], part["mask"], old_logp=part["old"], ref_logp=part["ref"],
            entropy=part["entropy"], entropy_coef=0.1, length=16, total=total,
        )[0]  # fmt: skip

    if chosen.aggregation != "token-mean":
        draw["entropy"].fill_(0.5)  # a mean over the tokens of each part: equal only where it is the same everywhere
        draw["mask"][3, 0] = 1  # or where a part has none
    total = losses.denominator(draw["mask"], chosen.aggregation)
    parts = [loss(rows, total) for rows in (slice(0, 1), slice(1, 6), slice(6, ROWS))]
    torch.testing.assert_close(sum(parts), loss(slice(None), None))


def test_actor_loss_is_policy_plus_divergence_minus_entropy(draw: dict[str, Tensor]) -> None:
    data, mask = numbers(draw), draw["mask"].numpy()

    def mean(values: Array) -> float:
        return float((values * mask).sum() / mask.sum())

    ratio = np.exp(data["logp"] - data["old"])
    policy = np.maximum(-data["advantages"] * ratio, -data["advantages"] * np.clip(ratio, 0.8, 1.2))
    back = data["ref"] - data["logp"]
    expected = mean(policy) + 0.04 * mean(np.clip(np.exp(back) - back - 1, -10, 10)) - 0.01 * mean(data["entropy"])
    loss, stats = actor_loss(
        Algorithm(), draw["logp"], draw["advantages"], draw["mask"], old_logp=draw["old"], ref_logp=draw["ref"],
        entropy=draw["entropy"], kl_coef=0.04, entropy_coef=0.01,
    )  # fmt: skip
    close(loss, expected)
    close(stats["actor/pg_loss"], mean(policy))
    close(stats["actor/entropy"], mean(data["entropy"]))


@pytest.mark.parametrize("name", ["grpo", "cispo", "rloo"])
def test_responses_that_are_not_taught_count_in_the_divisor_alone(draw: dict[str, Tensor], name: str) -> None:
    chosen, logp = dataclasses.replace(ALGORITHMS[name], kl="loss"), draw["logp"].clone().requires_grad_()
    entropy = logp.square()
    taught = (torch.arange(ROWS) < 4).float()

    def loss(rows: slice, weight: Tensor | None, total: Tensor | None, tokens: Tensor | None) -> Tensor:
        return actor_loss(
            chosen, logp[rows], draw["advantages"][rows], draw["mask"][rows], old_logp=draw["old"][rows],
            ref_logp=draw["ref"][rows], entropy=entropy[rows], entropy_coef=0.1, length=16, taught=weight,
            total=total, tokens=tokens,
        )[0]  # fmt: skip

    total = losses.denominator(draw["mask"], chosen.aggregation)
    found = loss(slice(None), taught, total, draw["mask"].sum())
    torch.testing.assert_close(found, loss(slice(0, 4), None, total, draw["mask"].sum()))
    found.backward()  # type: ignore[no-untyped-call]
    assert logp.grad is not None and logp.grad[:4].any() and not logp.grad[4:].any()


@pytest.mark.parametrize("clip", [0.5, None])
def test_value_loss(draw: dict[str, Tensor], clip: float | None) -> None:
    data = numbers(draw)
    width = np.inf if clip is None else clip
    near = np.clip(data["values"], data["old_values"] - width, data["old_values"] + width)
    expected = np.maximum((data["values"] - data["rewards"]) ** 2, (near - data["rewards"]) ** 2) / 2
    loss, _ = losses.value_loss(draw["values"], draw["old_values"], draw["rewards"], draw["mask"], clip)
    close(loss, expected)


def test_spo_follows_its_recurrence() -> None:
    """MiniMind-Ascend's numbers: Beta(1, 1), rewards in [-3, 3], half-life 0.06, rho in [0.5, 0.96], first 0.9."""
    baseline = advantages.Baseline()
    alpha, beta, last = 1.0, 1.0, None
    mask = torch.ones(2, 3)
    for rewards, logp in (([2.0, 1.0], -1.0), ([3.0, -30.0], -1.03), ([0.0, 0.5], -2.0), ([1.0, 1.0], -2.0)):
        expected = np.clip(np.array(rewards) - (alpha / (alpha + beta) * 6 - 3), -5, 5)
        close(baseline.advantages(torch.tensor(rewards), mask), np.tile(expected[:, None], (1, 3)))
        rho = 0.9 if last is None else min(max(2 ** (-abs(last - logp) / 0.06), 0.5), 0.96)
        share = (np.mean(rewards) + 3) / 6
        alpha, beta, last = rho * alpha + share, rho * beta + 1 - share, logp
        assert baseline.update(float(np.mean(rewards)), logp) == pytest.approx(rho)
    resumed = advantages.Baseline()
    resumed.load_state_dict(baseline.state_dict())
    assert resumed == baseline
    assert baseline.value == pytest.approx(alpha / (alpha + beta) * 6 - 3)


def test_groups_that_differ_are_kept_and_the_others_counted() -> None:
    scores = torch.tensor([1.0, 1, 1, 0, 0, 0, 1, 1, 0, 0, 0.5, 0.5])
    chosen = groups.select(scores, 2, right=1.0, wrong=0.0)
    assert chosen.keep.tolist() == [False, True, False, False, False, False]
    assert chosen.reasons == {"all_right": 2, "all_wrong": 2, "all_same": 1}
    assert chosen.rows(2).nonzero().flatten().tolist() == [2, 3]
    assert groups.select(scores, 1).keep.all()
    for value, named in ((1.0, "all_right"), (0.0, "all_wrong"), (-0.5, "all_wrong"), (0.5, "all_same")):
        assert groups.select(torch.full((8,), value), 4, right=1.0, wrong=0.0).reasons == {named: 2}
        assert groups.select(torch.full((8,), value), 4).reasons == {"all_same": 2}  # nobody knows what is right
    assert groups.statistics(scores, 2)["group/zero_std"] == pytest.approx(5 / 6)


def test_whitened_values_have_mean_0_and_variance_1(draw: dict[str, Tensor]) -> None:
    values = torch.where(draw["mask"].bool(), draw["values"] * 3 + 5, torch.nan)
    kept = masked.whiten(values, draw["mask"])[draw["mask"].bool()]
    assert kept.mean().item() == pytest.approx(0, abs=1e-6)
    assert kept.var().item() == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probabilities_and_entropy(temperature: float) -> None:
    logits, tokens = torch.randn(3, 5, 11), torch.randint(0, 11, (3, 5))
    expected = (logits / temperature).log_softmax(-1)
    logp, entropy = log_probs_and_entropy(logits, tokens, temperature)
    close(logp, expected.gather(-1, tokens.unsqueeze(-1)).squeeze(-1).numpy(), 1e-5)
    close(entropy, -(expected.exp() * expected).sum(-1).numpy(), 1e-5)


def test_mini_batches_see_every_response_once_an_epoch() -> None:
    plain = list(batches.mini_batches(6, 2, 3, epochs=2))
    assert [rows.tolist() for rows in plain] == [list(range(6)), list(range(6, 12))] * 2
    shuffled = list(batches.mini_batches(6, 2, 3, epochs=2, shuffle=True, seed=1))
    for epoch in (shuffled[:2], shuffled[2:]):
        assert sorted(torch.cat(epoch).tolist()) == list(range(12))
    assert torch.cat(shuffled[:2]).tolist() != torch.cat(shuffled[2:]).tolist()
    again = list(batches.mini_batches(6, 2, 3, epochs=2, shuffle=True, seed=1))
    assert all(torch.equal(a, b) for a, b in zip(shuffled, again, strict=True))
    with pytest.raises(UserError, match="mini_batch_size: found 4"):
        list(batches.mini_batches(6, 2, 4))


def test_micro_batches_hold_at_most_so_many_tokens_with_padding() -> None:
    lengths = [3, 4, 4, 5, 9, 10, 10, 30]
    parts = batches.token_batches(lengths, 20)
    assert parts == [[0, 1, 2, 3], [4, 5], [6], [7]]  # the last is longer than the budget
    assert batches.token_batches(lengths, 20, rows=2) == [[0, 1], [2, 3], [4, 5], [6], [7]]
    for unit in (1, 2, 3, 4, 8):
        even = batches.token_batches(lengths[-8:] if unit != 3 else lengths[:6], 20, unit=unit)
        assert len(even) % unit == 0 and all(even)
        assert [row for part in even for row in part] == list(range(6 if unit == 3 else 8))
    assert batches.token_batches([9, 2, 2], 18) == [[0, 1], [2]]  # a longer row first: its padding counts


def test_unknown_algorithm_names_the_nearest() -> None:
    assert algorithm("dr_grpo").spread == "none"
    with pytest.raises(UserError, match="Did you mean cispo"):
        algorithm("cispoo")
