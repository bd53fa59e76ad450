"""Configurations of reinforcement learning for tests: a tiny model on a tiny tokenizer."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from helpers import engine
from minimind_mcore.models.presets import PRESETS
from minimind_mcore.preprocess.indexed import IndexedWriter
from minimind_mcore.rl.models import model_section

# MiniMind's and minimind-ascend's own recipes in configs/rlxf: their reward model is for the embedded trainer alone.
RECIPES = ("rlaif_minimind3", "minimind_ascend_grpo", "minimind_ascend_ppo", "minimind_ascend_spo")
N = 4  # responses to a prompt
STEP = 4 * N  # responses of a step


def tree(corpus: engine.Corpus, model: str = "minimind3_tiny", **actor: Any) -> dict[str, Any]:
    """A configuration of four prompts with four responses each; what is given goes into `actor_config`."""
    config = PRESETS[model].replace(vocab_size=corpus.vocab_size)
    return {
        "model": {model: model_section(config)},
        "megatron_training": {
            "model": model, "global_batch_size": 4, "seq_length": 64, "train_iters": 10, "seed": 3,
            "tokenizer_name_or_path": str(corpus.tokenizer), "tokenizer_type": "PretrainedFromHF",
        },
        "actor_config": {"model": model, "micro_batch_size": 4, "lr": 1e-3, "lr_decay_style": "constant", **actor},
        "rl_config": {
            "actor_resource": {"num_npus": 1}, "n_samples_per_prompt": N, "mini_batch_size": 4,
            "init_kl_coef": 0.1, "entropy_coeff": 0.01,
        },
        "generate_config": {"infer_tensor_parallel_size": 1, "sampling_config": {"temperature": 0.8}},
        "minimind": {"precision": "fp32"},
    }  # fmt: skip


def run_tree(corpus: engine.Corpus, prompts: Path, folder: Path, **actor: Any) -> dict[str, Any]:
    """A configuration of a whole run of a few steps, whose reward is the share of even ids (`rewarded`)."""
    found = tree(corpus, save=str(folder / "checkpoints"), **actor)
    found["megatron_training"] |= {"train_iters": 4, "data_path": str(prompts), "save_interval": 2}
    found["rl_config"] |= {
        "verifier_function": ["helpers.rl_trees:rewarded"], "verifier_weight": [1.0], "num_cpus_for_placement_group": 1,
        "actor_resource": {"num_npus": 1},
    }  # fmt: skip
    found["generate_config"] |= {
        "max_num_seqs": 16, "dtype": "float32",
        "sampling_config": {"temperature": 0.8, "max_tokens": 8, "top_k": 50, "top_p": 0.95},
    }  # fmt: skip
    found["minimind"] |= {
        "output_dir": str(folder), "actor_timeout_s": 60.0, "cluster_wait_s": 60.0, "sample_interval": 0,
    }  # fmt: skip
    return found


def rewarded(response: str, label: str, **context: Any) -> float:
    """Share of letters of the first half of the tests' alphabet."""
    letters = [letter for letter in response if letter in "abcdefgh"]
    return sum(letter in "abcd" for letter in letters) / max(1, len(letters))


def write_prompts(prefix: Path, count: int = 12) -> Path:
    """Prompts and answers at a prefix."""
    numbers = np.random.default_rng(5)
    for name, longest in (("input_ids", 12), ("labels", 3)):
        lengths = numbers.integers(1, longest + 1, size=count)
        with IndexedWriter(f"{prefix}_packed_{name}_document") as writer:
            writer.add(numbers.integers(40, 500, size=lengths.sum()), lengths)
    return prefix


def spotty(response: str, label: str, **context: Any) -> float:
    """1 or 0, and the same for all responses to most prompts."""
    return float("a" in response) if len(context["prompt"]) % 3 == 0 else 0.0


def unhurried(response: str, label: str, **context: Any) -> float:
    """`rewarded`, slow enough for a test to do something meanwhile."""
    time.sleep(0.05)
    return rewarded(response, label, **context)


def unclipped(
    logp: Tensor, old_logp: Tensor, advantages: Tensor, mask: Tensor, *, clip_low: float, clip_high: float
) -> tuple[Tensor, Tensor]:
    """A policy loss -A logp that calls the second token of every response clipped."""
    second = torch.zeros_like(mask, dtype=torch.bool)
    second[:, 1:2] = True
    return -advantages * logp, second


def above_a_quarter(rewards: Tensor, mask: Tensor, n_samples: int, *, spread: str) -> Tensor:
    """The advantage of every token: how far the reward is above 1/4."""
    return (rewards - 0.25).unsqueeze(1) * mask


_asked = 0


def gated(response: str, label: str, **context: Any) -> float:
    """`rewarded`, once the file $RL_GATE lets the step through: it holds how many steps of this process may pass."""
    global _asked
    step, parent = _asked // STEP, os.getppid()
    _asked += 1
    while step >= int(Path(os.environ["RL_GATE"]).read_text()) and os.getppid() == parent:
        time.sleep(0.02)
    return rewarded(response, label, **context)


_generated = _losses = 0


def _until(name: str) -> None:
    """Wait for a file in $RL_EVENTS; not when the parent has ended."""
    parent = os.getppid()
    while not Path(os.environ["RL_EVENTS"], name).exists() and os.getppid() == parent:
        time.sleep(0.01)


def within_the_update(trajectories: Any, engines: Any, sampling: Any) -> None:
    """A rollout function: the responses of a step are generated when the update of the step before has begun."""
    global _generated
    _generated += 1
    if _generated > 1:
        _until(f"updating-{_generated - 1}")
    engines.generate(trajectories, sampling)
    Path(os.environ["RL_EVENTS"], f"generated-{_generated}").touch()


def around_the_rollout(
    logp: Tensor, old_logp: Tensor, advantages: Tensor, mask: Tensor, **clip: float
) -> tuple[Tensor, Tensor]:
    """A policy loss: an update of 4 micro-batches ends when the responses of the next of 4 steps are generated."""
    global _losses
    step, first = 1 + _losses // 4, _losses % 4 == 0
    _losses += 1
    if first:
        Path(os.environ["RL_EVENTS"], f"updating-{step}").touch()
        if step < 4:
            _until(f"generated-{step + 1}")
    return unclipped(logp, old_logp, advantages, mask, clip_low=0, clip_high=0)


# Overrides of grpo_minimind3 (64 prompts, 8 responses each, 8 devices), hosts, and which version of MindSpeed-RL
# refuses that; tests/contract/test_mindspeed_rl_config.py asks their own validations.
FILTER = "rl_config.filter_groups_enable=true rl_config.filter_groups_metric=math_17k_acc"
DAPO = f"{FILTER} rl_config.filter_groups_train_batch_size=32"
DISPATCH = [
    ("", 1, ""),
    ("", 3, "both"),
    ("", 4, ""),
    ("rl_config.reward_dispatch_size=96", 1, "both"),
    ("rl_config.actor_rollout_dispatch_size=128", 1, "both"),
    ("rl_config.actor_rollout_dispatch_size=32", 1, ""),
    ("rl_config.actor_logprob_dispatch_size=128", 1, "master"),
    ("rl_config.actor_logprob_dispatch_size=100", 1, "both"),
    ("rl_config.ref_dispatch_size=512", 1, "master"),
    ("rl_config.adv_dispatch_size=256", 1, ""),
    ("rl_config.actor_update_dispatch_size=32", 1, "both"),
    ("rl_config.actor_update_dispatch_size=32 rl_config.mini_batch_size=32", 1, ""),
    ("rl_config.actor_update_dispatch_size=128", 1, "master"),
    (FILTER, 1, "both"),
    (DAPO, 1, ""),
    (f"{DAPO} rl_config.actor_logprob_dispatch_size=64", 1, ""),
    (f"{DAPO} rl_config.adv_dispatch_size=512", 1, "both"),
    (f"{DAPO} rl_config.dynamic_sampling_dispatch_size=4", 1, "both"),
    (f"{DAPO} rl_config.dynamic_sampling_dispatch_size=512", 2, "master"),
    (f"{DAPO} rl_config.dynamic_sampling_dispatch_size=256", 2, ""),
    ("rl_config.use_remove_padding=true megatron_training.reset_attention_mask=true", 1, "2.2.0"),
    ("rl_config.use_remove_padding=true megatron_training.reset_position_ids=true", 1, "master"),
]
