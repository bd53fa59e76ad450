"""Which layer of a configuration decides about an algorithm's values, and that shipped configurations can earn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers.rl_trees import RECIPES

from minimind_mcore.preprocess.math_problems import careless, problems
from minimind_mcore.rl.algorithms.groups import select
from minimind_mcore.rl.algorithms.table import Algorithm
from minimind_mcore.rl.config.lint import lint
from minimind_mcore.rl.config.load import CONFIGS, compose, resolve
from minimind_mcore.rl.config.objective import objective, overlong_lengths, sampling_batches
from minimind_mcore.rl.main import grpo
from minimind_mcore.rl.runtime.workers.reward import build


def chosen(name: str, *overrides: str, directory: Path | None = None) -> Algorithm:
    return objective(resolve(compose(name, overrides, directory, device="cpu")))


GIVEN = [
    # DAPO, arXiv 2503.14476: clip 0.2 and 0.28, no KL term, groups that differ, overlong penalty
    ("grpo_minimind3", ["minimind.algorithm=dapo"], {
        "clip_low": 0.2, "clip_high": 0.28, "kl": "none", "dynamic_sampling": True, "overlong": True,
        "aggregation": "token-mean"}),
    # MiniMind's train_grpo.py: KL coefficient 0.1, ratio at most 5
    ("grpo_minimind_tiny", ["minimind.algorithm=cispo"], {
        "clip_high": 5.0, "kl": "loss", "kl_coef": 0.1, "aggregation": "seq-mean-token-mean"}),
    ("dapo_minimind3", ["minimind.algorithm=grpo", "megatron_training.stage=ray_grpo"], {
        "clip_low": 0.2, "clip_high": 0.2, "kl": "loss", "kl_coef": 0.01, "dynamic_sampling": False,
        "overlong": False}),
    ("grpo_minimind3", ["minimind.algorithm=dapo", "rl_config.clip_ratio=0.1",
                        "rl_config.filter_groups_enable=false"], {
        "clip_low": 0.1, "clip_high": 0.1, "dynamic_sampling": False, "overlong": True, "kl": "none"}),
    ("grpo_minimind3", ["minimind.algorithm=cispo", "rl_config={init_kl_coef: 0.3}"], {"kl_coef": 0.3}),
    ("grpo_minimind3", ["minimind.algorithm=grpo"], {"kl_coef": 0.01}),
    # GSPO, arXiv 2507.18071: clip 3e-4 and 4e-4; RLOO as in TRL; REINFORCE++, arXiv 2501.03262
    ("grpo_minimind3", ["minimind.algorithm=gspo"], {
        "loss": "gspo", "clip_low": 3e-4, "clip_high": 4e-4, "aggregation": "seq-mean-token-mean", "kl": "none"}),
    ("grpo_minimind3", ["minimind.algorithm=gspo", "rl_config.clip_ratio=0.1"], {"clip_low": 0.1, "clip_high": 0.1}),
    ("grpo_minimind3", ["minimind.algorithm=rloo", "minimind.dual_clip=3"], {
        "advantage": "rloo", "kl": "reward", "kl_kind": "kl", "kl_coef": 0.05, "dual_clip": 3.0}),
    ("grpo_minimind3", ["minimind.algorithm=reinforce_plus_plus_baseline"], {
        "advantage": "batch", "kl": "loss", "kl_kind": "mse", "dual_clip": None}),
    ("grpo_minimind3", ["rl_config.clip_ratio=0.1"], {"clip_low": 0.1, "clip_high": 0.1, "kl_coef": 0.001}),
    ("grpo_minimind_tiny", [], {"clip_high": 0.2, "kl_coef": 0.001}),
    ("ppo_minimind_tiny", [], {"clip_high": 0.2, "kl": "reward", "kl_kind": "kl", "kl_coef": 0.02}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "overrides", "expected"), GIVEN, ids=[f"{n} {' '.join(o)}" for n, o, _ in GIVEN])
def test_the_layer_that_sets_the_algorithm_and_later_ones_win(
    name: str, overrides: list[str], expected: dict[str, Any]
) -> None:
    found = chosen(name, *overrides)
    assert {key: getattr(found, key) for key in expected} == expected


def test_a_file_that_sets_the_algorithm_keeps_its_own_values_and_loses_those_of_its_base(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    top = {
        "defaults": ["grpo_minimind3", "_self_"],
        "rl_config": {"token_level_loss": True},
        "minimind": {"algorithm": "cispo", "cispo_clip": 3.0},
    }
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(top))
    found = chosen("mine", directory=tmp_path)
    assert (found.clip_high, found.aggregation, found.kl_coef) == (3.0, "token-mean", 0.1)
    said = capsys.readouterr().err
    assert "rl_config.init_kl_coef: 0.001 of grpo_minimind3.yaml" in said and "mine.yaml sets" in said
    # A file above it that only changes a value does not set the algorithm.
    (tmp_path / "above.yaml").write_text(
        yaml.safe_dump({"defaults": ["mine", "_self_"], "rl_config": {"init_kl_coef": 0.5}})
    )
    assert (chosen("above", directory=tmp_path).clip_high, chosen("above", directory=tmp_path).kl_coef) == (3.0, 0.5)
    # The command line's algorithm loses the file's values, but for those that it gives itself.
    found = chosen("mine", "minimind.algorithm=cispo", "rl_config.token_level_loss=false", directory=tmp_path)
    assert (found.clip_high, found.aggregation) == (5.0, "seq-mean-token-mean")


def test_a_run_prints_each_replaced_key_and_trains_with_the_table(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BACKEND", "embedded")
    words = ["--config-name", "grpo_minimind_tiny", "--device", "cpu", "--dry-run", "--data-pending"]
    grpo([*words, "minimind.algorithm=dapo"])
    out, err = capsys.readouterr()
    assert "clip_high=0.28" in out and "kl='none'" in out
    replaced = [line for line in err.splitlines() if line.startswith("replaced ")]
    assert [line.split(":")[0] for line in replaced] == [
        "replaced rl_config.clip_ratio",
        "replaced rl_config.init_kl_coef",
    ]
    assert "0.2 of grpo_minimind3.yaml" in replaced[0] and "the command line sets minimind.algorithm" in replaced[0]
    grpo(words)
    assert "replaced" not in capsys.readouterr().err


def test_mindspeed_rl_gets_the_values_of_the_table_in_its_own_keys() -> None:
    words = [
        "minimind.algorithm=dapo",
        "megatron_training.stage=ray_dapo",
        "rl_config.filter_groups_metric=math_17k_acc",
    ]
    _, tree, _ = lint("grpo_minimind3", "mindspeed-rl-master", words)
    rl = tree["rl_config"]
    assert "clip_ratio" not in rl
    assert (rl["clip_higher_enable"], rl["clip_ratio_low"], rl["clip_ratio_high"]) == (True, 0.2, 0.28)
    assert (rl["init_kl_coef"], rl["filter_groups_enable"], rl["overlong_buffer_enable"]) == (0.0, True, True)
    numbers = ("filter_groups_max_batches", "overlong_buffer", "rollout_max_tokens")
    assert [rl[key] for key in numbers] == [4, 256, 1024]


@pytest.mark.parametrize(
    ("name", "overrides", "batches", "penalized"),
    [
        ("grpo_minimind_tiny", [], 4, (16, 4)),
        ("grpo_minimind3", [], 4, (1024, 256)),
        ("dapo_minimind3", [], 4, (1024, 256)),
        ("grpo_minimind_tiny", ["rl_config.overlong_buffer=8", "rl_config.filter_groups_max_batches=2"], 2, (16, 8)),
        ("grpo_minimind_tiny", ["rl_config.overlong_buffer_enable=false"], 4, (16, 0)),
        ("grpo_minimind_tiny", ["minimind.algorithm=grpo"], 1, (16, 0)),
    ],
)
def test_dapo_on_another_configuration_samples_again_and_penalizes_long_responses(
    name: str, overrides: list[str], batches: int, penalized: tuple[int, int]
) -> None:
    config = resolve(compose(name, ["minimind.algorithm=dapo", *overrides], device="cpu"))
    assert sampling_batches(config) == batches and overlong_lengths(config) == penalized
    with build(config) as rewards:
        found = rewards.overlong
    assert (found and (found.room, found.buffer)) == (penalized if penalized[1] else None)


SAMPLE = "data/quickstart/grpo_minimind_math", "data/grpo_minimind_math"


@pytest.mark.parametrize("name", sorted({file.stem for file in CONFIGS.glob("*.yaml")} - {*RECIPES}))
def test_every_shipped_configuration_rewards_the_answers_of_its_default_data(name: str) -> None:
    """The model is tuned on a careless teacher's dialogues about the same questions: some are right, some wrong."""
    config = resolve(compose(name, device="cpu"))
    assert config.actor.data_path in SAMPLE
    answers = {record["question"]: record["answer"] for record in problems(1, 400)}
    taught = [r["conversations"] for r in careless(2, 20_000) if r["conversations"][0]["content"] in answers][:64]
    responses, labels = [t[1]["content"] for t in taught], [answers[t[0]["content"]] for t in taught]
    right = torch.tensor([response == f"\\boxed{{{label}}}" for response, label in zip(responses, labels, strict=True)])
    assert 8 < right.sum() < 64
    with build(config) as rewards:
        scores = rewards.score(responses, labels, lengths=torch.full((64,), 8))
    assert (scores.total[right] == 1).all() and (scores.total[~right] < 1).all()
    if objective(config).dynamic_sampling:
        assert select(scores.by_verifier[config.rl.filter_groups_metric], 8).keep.any()


def test_the_tiny_dapo_configuration_is_fit_and_asks_for_dapo() -> None:
    found = chosen("dapo_minimind_tiny")
    assert (found.clip_high, found.kl, found.dynamic_sampling, found.overlong) == (0.28, "none", True, True)
    config = resolve(compose("dapo_minimind_tiny", device="cpu"))
    assert config.model == "minimind3_tiny" and 0 < config.rl.overlong_buffer < config.rl.rollout_max_tokens == 16
