"""What is exported for verl is what the configuration means. (test_rl_data.py exports a whole run.)"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

from minimind_mcore.errors import UserError
from minimind_mcore.rl.config.load import compose, resolve
from minimind_mcore.rl.config.schema import Config
from minimind_mcore.rl.verl import export as export_verl

ACTOR = "actor_rollout_ref.actor"


def config(*overrides: str, name: str = "grpo_minimind3") -> Config:
    return resolve(compose(name, overrides, device="none"))


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([], {"loss_agg_mode": "token-mean", "use_kl_loss": True, "kl_loss_coef": 0.001, "kl_loss_type": "low_var_kl"}),
        (["minimind.algorithm=dr_grpo"], {"loss_agg_mode": "seq-mean-token-sum-norm", "use_kl_loss": False}),
        (["minimind.algorithm=cispo"], {"loss_agg_mode": "seq-mean-token-mean", "clip_ratio_high": 4.0}),
        (["minimind.algorithm=gspo"],
         {"policy_loss.loss_mode": "gspo", "loss_agg_mode": "seq-mean-token-mean", "clip_ratio_high": 4e-4}),
        (["minimind.algorithm=rloo", "minimind.dual_clip=3"],
         {"policy_loss.loss_mode": "vanilla", "loss_agg_mode": "seq-mean-token-sum", "clip_ratio_c": 3.0}),
        (["minimind.algorithm=dapo", "rl_config.filter_groups_enable=false", "rl_config.overlong_buffer_enable=false"],
         {"clip_ratio_high": 0.28, "clip_ratio_c": 1e9, "use_kl_loss": False}),
        (["rl_config.use_dynamic_bsz=true", "rl_config.update_max_packing_token_size=2048"],
         {"use_dynamic_bsz": True, "ppo_max_token_len_per_gpu": 2048}),
        (["rl_config.token_level_loss=false", "rl_config.kl_penalty=k2"],
         {"loss_agg_mode": "seq-mean-token-mean", "kl_loss_type": "mse"}),
        (["actor_config.adam_beta2=0.95"],
         {"optim.betas": "[0.9,0.95]", "optim.lr_scheduler_type": "cosine", "optim.min_lr_ratio": pytest.approx(0.1)}),
    ],
)  # fmt: skip
def test_the_objective_is_exported_as_the_trainer_has_it(overrides: list[str], expected: dict[str, Any]) -> None:
    found = export_verl.verl_overrides(config(*overrides), "x")
    assert {key: found[f"{ACTOR}.{key}"] for key in expected} == expected


def test_every_advantage_has_verl_s_name() -> None:
    names = {"rloo": "rloo", "reinforce_plus_plus": "reinforce_plus_plus"}
    names |= {"reinforce_plus_plus_baseline": "reinforce_plus_plus_baseline", "gspo": "grpo", "cispo": "grpo"}
    for name, expected in names.items():
        found = export_verl.verl_overrides(config(f"minimind.algorithm={name}"), "x")
        assert found["algorithm.adv_estimator"] == expected
    with pytest.raises(UserError, match=r"spo is not in verl's main_ppo; it has grpo, .*gspo, cispo, rloo"):
        export_verl.verl_overrides(config("minimind.algorithm=spo"), "x")


def test_a_penalty_in_the_reward_and_the_critic_s_schedule() -> None:
    found = export_verl.verl_overrides(config(name="ppo_minimind3"), "x")
    assert found["algorithm.use_kl_in_reward"] and found["algorithm.kl_penalty"] == "kl"
    assert found["algorithm.kl_ctrl.kl_coef"] == 0.02 and not found[f"{ACTOR}.use_kl_loss"]
    assert found["critic.optim.lr"] == 5e-6 and found["critic.optim.lr_scheduler_type"] == "cosine"
    assert found["++reward.custom_reward_function.name"] == "compute_score"
    assert "++reward.custom_reward_function.path=" in (export_verl.TEMPLATES / "run.sh.in").read_text()


def test_megatron_keeps_the_layout_and_the_schedule() -> None:
    chosen = config("actor_config.tensor_model_parallel_size=2", "actor_config.lr_decay_style=linear")
    found = export_verl.verl_overrides(chosen, "x", "megatron")
    assert found["model_engine"] == "megatron" and found[f"{ACTOR}.megatron.tensor_model_parallel_size"] == 2
    assert found[f"{ACTOR}.optim.lr_decay_style"] == "linear" and found[f"{ACTOR}.optim.min_lr"] == chosen.actor.min_lr
    assert not any("FSDP" in line for line in export_verl.differences(chosen, "megatron"))


def test_what_verl_does_not_have_is_refused_or_said() -> None:
    long = "overlong_buffer_enable=true", "overlong_buffer=64", "rollout_max_tokens=1024"
    with pytest.raises(UserError, match="overlong_buffer_enable: the penalty cannot be exported"):
        export_verl.verl_overrides(config(*(f"rl_config.{word}" for word in long)), "x")
    with pytest.raises(UserError, match="no dynamic sampling"):
        export_verl.verl_overrides(config("rl_config.filter_groups_enable=true"), "x")
    said = [*export_verl.differences(config("actor_config.lr_decay_style=linear", "minimind.algorithm=cispo"))]
    assert any("lr_decay_style linear" in line for line in said) and any("sample standard" in line for line in said)


def test_a_reward_of_the_user_s_travels_and_sees_the_prompt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "my_verl_reward.py").write_text(
        "def f(response, label, prompt='', record=None, **context):\n"
        "    return float(prompt == 'What is 1+1?' and record['gt'] == ['2'])\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path / "run"))
    export_verl._reward(config("minimind.rewards=[{path: 'my_verl_reward:f', weight: 2}]"), tmp_path)
    monkeypatch.undo()
    sys.modules.pop("my_verl_reward")
    importlib.invalidate_caches()
    spec = importlib.util.spec_from_file_location("exported_reward", tmp_path / "reward.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setattr(sys, "path", [*sys.path])
    try:
        spec.loader.exec_module(module)
        score = module.compute_score("x", "\\boxed{2}", "2", {"prompt": "What is 1+1?", "record": '{"gt": ["2"]}'})
    finally:
        if module._rewards is not None:
            module._rewards.close()
        sys.modules.pop("my_verl_reward", None)
    assert score == 3.0
