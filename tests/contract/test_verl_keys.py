"""verl's own configuration accepts every key that the exporter writes. VERL_HOME holds verl 0.9.1's folder `verl`."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from minimind_mcore.rl.config.load import compose, resolve
from minimind_mcore.rl.verl.export import verl_overrides

pytestmark = pytest.mark.slow
CONFIGS = {
    "grpo_minimind3": [], "grpo_minimind3_moe": [], "grpo_minimind_tiny": ["minimind.algorithm=cispo"],
    "grpo_minimind2": ["minimind.rollout_correction=tis"], "ppo_minimind3": [],
    "grpo_minimind2_small": ["minimind.algorithm=gspo"], "grpo_minimind3_separate": ["minimind.algorithm=rloo"],
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_verl_composes_what_is_exported(name: str) -> None:
    home = os.environ.get("VERL_HOME")
    if not home:
        pytest.skip("VERL_HOME is not set: no sources of verl")
    import hydra

    values = verl_overrides(resolve(compose(name, CONFIGS[name], device="npu")), name)
    values |= {
        "data.train_files": "a",
        "data.val_files": "b",
        "trainer.default_local_dir": "c",
        "trainer.device": "npu",
    }
    values |= {f"++{key}custom_reward_function.path": "reward.py" for key in ("", "reward.")}
    words = [f"{key}={str(value).lower() if isinstance(value, bool) else value}" for key, value in values.items()]
    with hydra.initialize_config_dir(str(Path(home, "verl/trainer/config").resolve()), version_base=None):
        tree = hydra.compose("ppo_trainer", overrides=words)
    assert tree.data.train_batch_size == values["data.train_batch_size"] and tree.trainer.device == "npu"
