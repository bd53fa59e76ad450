"""Each algorithm, and each way to divide the work, through the trainer: a few steps on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import engine, rl_ray, rl_trees
from helpers.weights_on_disk import state_dict, write_hf

from minimind_mcore.models.presets import PRESETS

DEADLINE = 900.0
pytestmark = pytest.mark.timeout(DEADLINE + 30)
Rows = dict[str, list[dict[str, Any]]]


def variants(corpus: engine.Corpus, folder: Path) -> dict[str, dict[str, Any]]:
    """A configuration of each."""
    prompts = rl_trees.write_prompts(folder / "prompts")

    def variant(name: str, rl: dict[str, Any], ours: dict[str, Any], **more: Any) -> dict[str, Any]:
        found = rl_trees.run_tree(corpus, prompts, folder / name)
        found["megatron_training"] |= {"train_iters": 2, "save_interval": None}
        found["rl_config"] |= rl
        found["minimind"] |= ours
        return found | more

    resources = {"use_integrated_worker": False, "reference_resource": {"num_npus": 1}}
    kept = {"save_rollouts": str(folder / "rollouts")}
    own = {"policy_loss": "helpers.rl_trees:unclipped", "advantage": "helpers.rl_trees:above_a_quarter"}
    own |= {"save_rollouts": str(folder / "own" / "rollouts")}
    dapo = {
        "filter_groups_enable": True,
        "filter_groups_max_batches": 3,
        "filter_groups_metric": "helpers.rl_trees:spotty",
    }
    rewards = {
        "verifier_function": ["helpers.rl_trees:rewarded", "helpers.rl_trees:spotty"],
        "verifier_weight": [1.0, 1.0],
    }
    stale = {"staleness": 2, "rollout_correction": "tis", "save_rollouts": str(folder / "stale" / "rollouts")}
    partial = {"save_rollouts": str(folder / "partial" / "rollouts")}
    return {
        "grpo": variant("grpo", {}, kept | {"weight_check_interval": 1}),
        "apart": variant("apart", resources, {}, ref_config={"model": "minimind3_tiny", "micro_batch_size": 4}),
        "replay": variant("replay", {"mini_batch_size": 2, "epochs": 2}, {"replay_rollouts": str(folder / "rollouts")}),
        "ahead": variant("ahead", {"blocking": False}, {}),
        "stale": variant("stale", {"blocking": False}, stale),
        "partial": variant("partial", {"partial_rollout_max_split": 4}, partial),
        "dapo": variant("dapo", dapo | rewards, {"algorithm": "dapo"}),
        "spo": variant("spo", {"n_samples_per_prompt": 1}, {"algorithm": "spo"}),
        "cispo": variant("cispo", {}, {"algorithm": "cispo"}),
        "dr_grpo": variant("dr_grpo", {}, {"algorithm": "dr_grpo"}),
        "gspo": variant("gspo", {"mini_batch_size": 2}, {"algorithm": "gspo"}),
        "rloo": variant("rloo", {}, {"algorithm": "rloo", "dual_clip": 3.0}),
        "reinforce": variant("reinforce", {"n_samples_per_prompt": 1}, {"algorithm": "reinforce_plus_plus"}),
        "reinforced": variant("reinforced", {}, {"algorithm": "reinforce_plus_plus_baseline"}),
        "ppo": variant("ppo", {"adv_estimator": "gae"}, {"algorithm": "ppo"}),
        "own": variant("own", {"init_kl_coef": 0, "entropy_coeff": 0}, own),
    }


@pytest.fixture(scope="module", params=["local", pytest.param("ray", marks=pytest.mark.slow)])
def runs(
    request: pytest.FixtureRequest,
    server: engine.Server,
    corpus: engine.Corpus,
    tmp_path_factory: pytest.TempPathFactory,
) -> Rows:
    """The steps of each run: in a process, or by actors."""
    folder = tmp_path_factory.mktemp("algorithms")
    trees, output = variants(corpus, folder), ""
    if request.param == "ray":
        output = rl_ray.run(folder, [{"name": name, "tree": tree} for name, tree in trees.items()], DEADLINE)
    for name, tree in trees.items() if request.param == "local" else ():
        (folder / f"{name}.json").write_text(json.dumps(tree), encoding="utf-8")
        output += server.run(["--tree", str(folder / f"{name}.json")], folder / name, module="helpers.rl_local").output
    assert "spoilt, sent again, equal" in output
    assert request.param == "ray" or "reference: random weights" in output
    return {name: [row | {"folder": folder / name} for row in rl_ray.rows(folder / name)] for name in trees}


def test_every_algorithm_trains(runs: Rows) -> None:
    for name, rows in runs.items():
        assert [row["iteration"] for row in rows] == [1, 2], name
        assert all(row["actor/grad_norm"] > 0 for row in rows), name


def test_the_engine_s_log_probabilities_are_the_trainer_s(runs: Rows) -> None:
    for name in ("grpo", "apart", "dapo", "cispo", "dr_grpo", "rloo", "reinforce", "reinforced", "spo", "ppo"):
        assert all(row["rollout/logp_diff"] < 1e-4 for row in runs[name]), name


def test_a_reference_apart_says_the_same(runs: Rows) -> None:
    for mine, expected in zip(runs["apart"], runs["grpo"], strict=True):
        for key in ("actor/kl_loss", "actor/pg_loss", "actor/grad_norm", "grpo/score/mean"):
            assert mine[key] == expected[key], key
    assert runs["grpo"][1]["actor/kl_loss"] > 0


def test_a_reference_apart_without_load_has_the_weights_of_the_actor(
    server: engine.Server, corpus: engine.Corpus, tmp_path: Path
) -> None:
    config = PRESETS["minimind3_tiny"].replace(vocab_size=corpus.vocab_size)
    weights = write_hf(tmp_path / "hf", config, state_dict(config, "hf"))
    tree = rl_trees.run_tree(corpus, rl_trees.write_prompts(tmp_path / "prompts"), tmp_path, load=str(weights))
    tree["megatron_training"] |= {"train_iters": 1, "save_interval": None}
    tree["rl_config"] |= {"use_integrated_worker": False, "reference_resource": {"num_npus": 1}}
    tree["ref_config"] = {"model": "minimind3_tiny", "micro_batch_size": 4}
    (tmp_path / "tree.json").write_text(json.dumps(tree), encoding="utf-8")
    done = server.run(["--tree", str(tmp_path / "tree.json")], tmp_path, module="helpers.rl_local")
    (row,) = rl_ray.rows(tmp_path)
    assert row["actor/kl_loss"] < 1e-6 and "random weights" not in done.output


def test_saved_rollouts_train_again_with_other_mini_batches(runs: Rows) -> None:
    assert runs["replay"][0]["grpo/score/mean"] == runs["grpo"][0]["grpo/score/mean"]
    assert runs["replay"][0]["actor/ppo_kl"] != 0  # the second update is off the policy that wrote
    assert runs["replay"][0]["rollout/logp_diff_max"] < 1e-4


def test_one_step_ahead_responses_come_from_the_weights_before(runs: Rows) -> None:
    first, second = runs["ahead"]
    assert first["grpo/score/mean"] == runs["grpo"][0]["grpo/score/mean"]
    assert abs(first["actor/ppo_kl"]) < 1e-5
    assert second["rollout/logp_diff"] > 1e-3


def test_dynamic_sampling_draws_until_the_groups_differ(runs: Rows) -> None:
    assert any(row["train/num_gen_batches"] > 1 for row in runs["dapo"])
    assert any(name.startswith("group/dropped/") for row in runs["dapo"] for name in row)


def test_ppo_s_critic_learns_what_to_expect(runs: Rows) -> None:
    first, second = runs["ppo"]
    assert first["critic/values/mean"] == 0 and second["critic/values/mean"] != 0
    assert second["critic/vf_loss"] < first["critic/vf_loss"]


def test_spo_s_baseline_moves_towards_the_rewards(runs: Rows) -> None:
    first, second = runs["spo"]
    assert first["spo/baseline"] == 0 and 0 < second["spo/baseline"] < 1


def test_a_loss_and_an_advantage_of_the_user_s_are_trained_on(runs: Rows) -> None:
    """The policy's loss is -(reward - 1/4) logp, averaged over the tokens of all responses."""
    for row in runs["own"]:
        batch = torch.load(f"{row['folder']}/rollouts/rollouts-{row['iteration']:07d}.pt")["batch"]
        lengths = batch["response_lengths"]
        inside = torch.arange(int(lengths.max())) < lengths[:, None]
        weighed = (0.25 - batch["rewards"])[:, None] * batch["rollout_logp"]
        assert row["actor/pg_loss"] == pytest.approx(weighed[inside].mean().item(), rel=1e-4)
        assert row["actor/pg_clipfrac"] == pytest.approx((lengths > 1).sum().item() / inside.sum().item())


def saved(row: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The batch of a step that kept its rollouts."""
    found: dict[str, torch.Tensor] = torch.load(f"{row['folder']}/rollouts/rollouts-{row['iteration']:07d}.pt")["batch"]
    return found


def test_responses_of_older_weights_are_weighed_by_the_truncated_importance_ratio(runs: Rows) -> None:
    """The single update has a ratio of 1, so that the loss of a token is -A min(p of the trainer / p that wrote, 2)."""
    first, second = runs["stale"]
    assert first["actor/tis_weight"] == pytest.approx(1, abs=1e-4)
    batch = saved(second)
    inside, weight = batch["mask"].bool(), (batch["old_logp"] - batch["rollout_logp"]).double().exp()
    assert (weight[inside] - 1).abs().max() > 1e-2
    assert second["actor/tis_weight"] == pytest.approx(weight[inside].mean().item(), rel=1e-4)
    tokens = (-batch["advantages"] * weight.clamp(max=2))[inside].mean().item()
    assert second["actor/pg_loss"] == pytest.approx(tokens, rel=1e-3, abs=1e-6)
    assert second["rollout/logp_diff_same_weights"] < 1e-4 < second["rollout/logp_diff"]


def test_responses_in_parts_are_complete_and_of_the_trainer_s_model(runs: Rows) -> None:
    """A call of an engine generates 2 of 8 tokens; test_rl_manager.py has responses that go on in the next step."""
    for row in runs["partial"]:
        batch = saved(row)
        assert ((batch["response_lengths"] == 8) | batch["finished"]).all()
        assert row["response_length/max"] <= 8
    assert runs["partial"][0]["rollout/logp_diff"] < 1e-4
