"""MindSpeed-RL's own programs train MiniMind on this CPU, with real Ray, and agree with the embedded trainer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from helpers import rehearsal, rl_rehearsal
from helpers.engine import TRACKER, read_rows
from helpers.rl_rehearsal import RlInputs

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> RlInputs:
    """Sums, models, and the environment of the rehearsal."""
    if reason := rl_rehearsal.missing():
        pytest.skip(reason)
    return rl_rehearsal.make_inputs(tmp_path_factory.mktemp("rl"))


@dataclass(frozen=True)
class Case:
    """What is rehearsed.

    Attributes:
        config: a YAML of configs/rlxf.
        model: a preset.
        tp: tensor-parallel size of training and of generation.
        npus: of the actor.
        more: hydra overrides.
    """

    config: str = "grpo_minimind_tiny"
    model: str = "minimind3_tiny"
    tp: int = 1
    npus: int = 2
    more: tuple[str, ...] = ()


CASES = {
    "grpo": Case(),
    "grpo minimind2": Case(model="minimind2_tiny"),
    "grpo TP2": Case(tp=2),
    "grpo mixture": Case(
        model="minimind3_moe_tiny",
        more=(
            "megatron_training.use_distributed_optimizer=false",
            "megatron_training.moe_token_dispatcher_type=alltoall",
        ),
    ),
    "dapo": Case("dapo_minimind_tiny", more=("rl_config.filter_groups_enable=false",)),
    "ppo": Case(
        "ppo_minimind_tiny",
        more=("critic_config.load_checkpoint_loosely=true", "megatron_training.save_interval=2"),
    ),
    "grpo separate workers": Case("grpo_minimind3_separate", npus=1, more=rl_rehearsal.SEPARATE),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_two_steps_are_trained_and_saved(name: str, inputs: RlInputs, tmp_path: Path) -> None:
    case = CASES[name]
    load = inputs.weights(case.model, case.tp)
    folder = tmp_path / "run"
    run = rl_rehearsal.run(inputs, folder, case.config, case.model, case.npus, case.tp, *case.more)
    assert [step["iteration"] for step in run.steps] == [1, 2]
    assert all(step["actor/grad_norm"] > 0 for step in run.steps)
    assert "strict:" not in run.output
    saved = folder / "checkpoints"
    assert (saved / TRACKER).read_text() == "2"
    converted = tmp_path / "hf"
    convert = {"TOKENIZER_PATH": str(inputs.model(case.model)), "SAVE_DIR": str(converted), "LOAD_DIR": str(saved)}
    rehearsal.run_script("ckpt_convert_minimind_mcore2hf.sh", rehearse=False, **convert)
    before, after = rl_rehearsal.tensors(inputs.model(case.model)), rl_rehearsal.tensors(converted)
    assert load and before.keys() == after.keys()
    changes = {key: (before[key].float() - after[key].float()).abs().max().item() for key in before}
    assert 0 < max(changes.values()) < 0.05  # two updates, with a learning rate of 3e-4 at most


def test_an_interrupted_run_goes_on(inputs: RlInputs, tmp_path: Path) -> None:
    whole = rl_rehearsal.run(inputs, tmp_path / "whole", "grpo_minimind_tiny", "minimind3_tiny", 2, 1,
                             "megatron_training.save_interval=1", "actor_config.lr_decay_style=linear")  # fmt: skip
    half = tmp_path / "half"
    half.mkdir()
    (half / "iter_0000001").symlink_to(tmp_path / "whole/checkpoints/iter_0000001")
    (half / TRACKER).write_text("1")
    reference = f"{{ref_model_load_path: {inputs.weights('minimind3_tiny', 1)}}}"
    resumed = rl_rehearsal.run(
        inputs, tmp_path / "resumed", "grpo_minimind_tiny", "minimind3_tiny", 2, 1, f"actor_config.load={half}",
        "actor_config.finetune=false", "actor_config.no_load_optim=false", "actor_config.no_load_rng=false",
        "actor_config.lr_decay_style=linear", f"rl_config.integrated_mode_config={reference}",
    )  # fmt: skip
    assert [step["iteration"] for step in whole.steps] == [1, 2]
    assert [step["iteration"] for step in resumed.steps] == [2]
    assert resumed.steps[0]["actor/lr"] == pytest.approx(whole.steps[1]["actor/lr"])
    assert resumed.steps[0]["actor/kl_loss"] > 0  # the reference is the model that the first run began with
    assert (tmp_path / "resumed/checkpoints" / TRACKER).read_text() == "2"


def test_log_probabilities_and_losses_are_the_embedded_trainers(inputs: RlInputs, tmp_path: Path) -> None:
    """The embedded trainer learns from the responses that MindSpeed-RL's run recorded. MindSpeed-RL has bf16 only."""
    # With a rate of 1e-3 the KL of step 2 stands out from the rounding of bf16, and of the four decimals in the log.
    same = ("actor_config.lr=1.0e-3", "actor_config.lr_decay_style=constant", "actor_config.micro_batch_size=32",
            "rl_config.init_kl_coef=0.1")  # fmt: skip
    recorded = tmp_path / "rollouts"
    theirs = rl_rehearsal.run(inputs, tmp_path / "theirs", "grpo_minimind_tiny", "minimind3_tiny", 1, 1, *same,
                              "rl_config.zmq_communication=false", REHEARSAL_ROLLOUTS=str(recorded))  # fmt: skip
    found = (torch.load(f"{recorded}.0.update-{step}.pt", weights_only=False) for step in (1, 2))
    updates = [rl_rehearsal.in_groups(update["batch"]) for update in found]
    replay, generated = tmp_path / "replay", rl_rehearsal.generated(recorded)
    for step, update in enumerate(updates, start=1):
        rl_rehearsal.save_for_replay(update, generated, replay, step)
    ours = rl_rehearsal.run_embedded(
        inputs,
        tmp_path / "ours",
        "minimind3_tiny",
        *same,
        f"minimind.replay_rollouts={replay}",
        f"minimind.save_rollouts={tmp_path / 'kept'}",
    )
    rows = [row for row in read_rows(tmp_path / "ours") if "actor/pg_loss" in row]
    assert len(rows) == len(theirs.steps) == 2, ours
    for step, (update, row, logged) in enumerate(zip(updates, rows, theirs.steps, strict=True), start=1):
        kept = torch.load(tmp_path / f"kept/rollouts-{step:07d}.pt", weights_only=True)["batch"]
        assert rl_rehearsal.logp_difference(update, kept) < 1e-2  # 2e-2 is promised
        assert row["actor/kl_loss"] == pytest.approx(logged["actor/kl_loss"], rel=2e-2, abs=1e-4)
        # MindSpeed-RL logs the absolute value of the whole loss, the KL term included.
        whole = abs(row["actor/pg_loss"] + 0.1 * row["actor/kl_loss"])
        assert whole == pytest.approx(logged["actor/pg_loss"], rel=2e-2, abs=1e-4)
        assert row["actor/grad_norm"] == pytest.approx(logged["actor/grad_norm"], rel=2e-2)
