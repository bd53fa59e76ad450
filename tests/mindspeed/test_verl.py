"""The configuration of verl 0.9.1 takes what is exported for it, with the same values.

VERL_HOME is the folder that holds the package `verl`: a checkout, or an unpacked wheel (pip download --no-deps
verl==0.9.1). Older releases have other keys: 0.8.0 in development (2026-01-29) has no `model_engine`.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir  # pyright: ignore[reportMissingImports]

from minimind_mcore.rl.config.load import compose as compose_own
from minimind_mcore.rl.config.load import resolve
from minimind_mcore.rl.verl.export import ENGINES, TEMPLATES, verl_overrides

pytestmark = pytest.mark.slow

CONFIGS = ("grpo_minimind3", "grpo_minimind_tiny", "ppo_minimind3")


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", CONFIGS)
def test_verl_takes_every_key(name: str, engine: str) -> None:
    home = os.environ.get("VERL_HOME")
    if not home:
        pytest.skip("VERL_HOME is not set: no sources of verl")
    sizes = [f"actor_config.tensor_model_parallel_size={1 + (engine == 'megatron')}"]
    config = resolve(compose_own(name, sizes, device="npu"))
    values = verl_overrides(config, name, engine)
    words = [f"{key}={str(value).lower() if isinstance(value, bool) else value}" for key, value in values.items()]
    script = (TEMPLATES / "run.sh.in").read_text().replace('"', "").split()
    words += [word.replace("$HERE", "folder") for word in script if "=$HERE" in word]
    with initialize_config_dir(str(Path(home).absolute() / "verl/trainer/config"), version_base=None):
        found = compose("ppo_trainer", overrides=[*words, "trainer.device=npu"])
    actor, critic = found.actor_rollout_ref.actor, found.critic
    assert (actor.strategy == "megatron") == (engine == "megatron")
    assert (
        actor.optim.lr == config.actor.lr and actor.clip_ratio_high == values["actor_rollout_ref.actor.clip_ratio_high"]
    )
    assert found.reward.custom_reward_function.path == "folder/reward.py"
    if engine == "megatron":
        assert (
            actor.megatron.tensor_model_parallel_size == found.actor_rollout_ref.ref.megatron.tensor_model_parallel_size
        )
        assert (
            actor.megatron.tensor_model_parallel_size == 2 and actor.optim.lr_decay_style == config.actor.lr_decay_style
        )
    if config.critic:
        assert critic.optim.lr == config.critic.lr
