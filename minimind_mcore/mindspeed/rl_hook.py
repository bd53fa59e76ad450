"""MindSpeed-RL taught MiniMind, and repaired, in every Ray worker, without an edit of it.

    runtime_env.yaml:   worker_process_setup_hook: minimind_mcore.mindspeed.rl_hook.setup

Each change is made when its module is imported, and logged once a process. What they are for:

| module | change |
|---|---|
| workers.resharding.weight_adaptor | MiniMind2 (a Llama) gets a weight adaptor; MiniMind-3's mixture one on 2.2.0 |
| utils.tokenizer | a pad id of 0, as MiniMind's is, counts as one: rows without an end lose their padding |
| models.rollout.vllm_engine | the synchronous rollout of master gets ids, not texts without their special tokens |
| models.base.base_training_engine | passes for log-probabilities keep their order under shuffle_mini_batch; a
  temperature of 0 is refused instead of divided by |
| models.rule_verifier | a verifier that is an import path, package.module:function, is called; an unknown name is an
  error instead of a reward of 0 |

A loss of one's own would have to take the place of `ray_grpo_actor`, the only stage beside `ray_ppo` that
MindSpeed-LLM's parser lets through; there is none here: CISPO, Dr.GRPO and SPO run on the embedded trainer.
"""

from __future__ import annotations

import functools
import inspect
import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any

from minimind_mcore.errors import UserError
from minimind_mcore.mindspeed.patching import after_import

logger = logging.getLogger("minimind_mcore.mindspeed")


def setup() -> None:
    """Arrange for every change; importing nothing of MindSpeed-RL."""
    for module, patch in PATCHES.items():
        after_import(f"mindspeed_rl.{module}", patch)


def _log(change: str) -> None:
    print(f"minimind: {change}", file=sys.stderr, flush=True)
    logger.info(change)


# Weights


def add_adaptors(module: ModuleType) -> None:
    """Adaptors for the classes that vLLM builds of MiniMind's Hugging Face directories."""
    registry = module.WEIGHT_ADAPTOR_REGISTRY
    for name, adaptor in (
        ("LlamaForCausalLM", "QwenMVWeightAdaptor"),
        ("Qwen3MoeForCausalLM", "Qwen3MoeMVWeightAdaptor"),
    ):
        if name not in registry:
            registry[name] = getattr(module, adaptor)
            _log(f"weight adaptor of {name}: {adaptor}")


# Tokens


class PadId(int):
    """A token id that counts as given even if it is 0."""

    def __bool__(self) -> bool:
        return True


def keep_pad(module: ModuleType) -> None:
    """`tokenizer.pad if tokenizer.pad else tokenizer.eod` takes the pad id."""
    cls = module._HuggingFaceTokenizer
    found = cls.pad

    def pad(self: Any) -> PadId | None:
        value = found.fget(self)
        return None if value is None else PadId(value)

    cls.pad = property(pad, found.fset, found.fdel, found.__doc__)
    _log("pad id 0 counts as a pad id")


# Rollout


def roll_out_ids(module: ModuleType) -> None:
    """vLLM gets the ids that the training sees."""
    cls = module.VLLMInferEngine
    original = cls.generate_sequences

    @functools.wraps(original)
    def generate_sequences(self: Any, idx_list: Sequence[Any], **kwargs: Any) -> Any:
        ids = [[int(token) for token in prompt] for prompt in idx_list]
        generate = self.llm.generate

        def with_ids(prompts: Any = None, **options: Any) -> Any:
            if isinstance(prompts, list) and prompts and isinstance(prompts[0], str):
                prompts = [{"prompt_token_ids": prompt} for prompt in ids]
            return generate(prompts=prompts, **options)

        self.llm.generate = with_ids
        try:
            return original(self, idx_list, **kwargs)
        finally:
            self.llm.generate = generate

    cls.generate_sequences = generate_sequences
    _log("synchronous rollouts get the ids of their prompts")


# Training


def keep_order(module: ModuleType) -> None:
    """No shuffling where nothing is learnt; no division by a temperature of 0."""
    cls = module.BaseTrainingEngine
    original = cls._forward_backward_batch

    @functools.wraps(original)
    def forward_backward(self: Any, batch: Any, forward_only: bool = False) -> Any:
        if getattr(self, "temperature", 1.0) <= 0:
            raise UserError("sampling_config.temperature: found 0, expected more: log-probabilities are divided by it")
        shuffle, self.shuffle_mini_batch = self.shuffle_mini_batch, self.shuffle_mini_batch and not forward_only
        try:
            return original(self, batch, forward_only)
        finally:
            self.shuffle_mini_batch = shuffle

    cls._forward_backward_batch = forward_backward
    _log("passes for log-probabilities keep their order")


# Rewards


def call_user_rewards(module: ModuleType) -> None:
    """Verifiers by import path; unknown names refused."""
    original = module.verifier

    @functools.wraps(original)
    def verifier(responses: Sequence[str], data: Any, config: Any, **kwargs: Any) -> Any:
        from minimind_mcore.rl.lint import NEW_VERIFIERS, VERIFIERS

        total, metrics = original(responses, data, config, **kwargs)
        for name, weight in zip(config.verifier_function, config.verifier_weight, strict=True):
            if ":" in name:
                scores = _scores(name, responses, data)
                metrics[f"{name}_rewards/mean"] = scores
                total = [value + weight * score for value, score in zip(total, scores, strict=True)]
            elif f"{name}_rewards/mean" not in metrics:
                known = ", ".join(sorted(VERIFIERS | NEW_VERIFIERS))
                raise UserError(f"verifier_function {name}: unknown to this MindSpeed-RL (known: {known})")
        return total, metrics

    module.verifier = verifier  # type: ignore[attr-defined]
    _log("verifiers may be import paths, and unknown ones are errors")


def _scores(name: str, responses: Sequence[str], data: Mapping[str, Sequence[Any]]) -> list[float]:
    """A function of the user's called as the embedded trainer calls it: with the columns that it names."""
    from minimind_mcore.rl.rewards.workers import resolve

    function: Callable[..., float] = resolve(name)
    named = inspect.signature(function).parameters
    columns = {key: values for key, values in data.items() if key != "labels" and key in named}
    return [
        float(function(response, label, **{key: values[row] for key, values in columns.items()}))
        for row, (response, label) in enumerate(zip(responses, data["labels"], strict=True))
    ]


PATCHES: dict[str, Callable[[ModuleType], None]] = {
    "workers.resharding.weight_adaptor": add_adaptors,
    "utils.tokenizer": keep_pad,
    "models.rollout.vllm_engine": roll_out_ids,
    "models.base.base_training_engine": keep_order,
    "models.rule_verifier": call_user_rewards,
}
