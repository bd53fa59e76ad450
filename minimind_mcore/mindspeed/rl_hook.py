"""Patch MindSpeed-RL for MiniMind in every Ray worker, without editing its files.

    runtime_env.yaml:   worker_process_setup_hook: minimind_mcore.mindspeed.rl_hook.setup

Each change is applied when its module is imported, and logged once per process:

| module | change |
|---|---|
| workers.resharding.weight_adaptor | add weight adaptors for MiniMind2 (a Llama) and, on 2.2.0, MiniMind-3's mixture |
| utils.tokenizer | accept 0 as a pad id, so that rows without an end token lose their padding |
| models.rollout.vllm_engine | master's synchronous rollout passes ids, not texts without their special tokens |
| models.base.base_training_engine | forward passes for log-probabilities are not shuffled by shuffle_mini_batch; a
  temperature of 0 is refused, because logits are divided by it |
| workers.base_worker | separate workers get the profiler settings, which master gives only to the integrated worker |
| models.rule_verifier | a verifier can be an import path package.module:function, called as in the embedded trainer;
  an unknown name is an error instead of a reward of 0 |

Custom losses are not supported: a loss would have to replace `ray_grpo_actor`, because MindSpeed-LLM's parser accepts
no other stage besides `ray_ppo`. CISPO, Dr.GRPO and SPO therefore need the embedded trainer.
"""

from __future__ import annotations

import atexit
import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from types import ModuleType
from typing import TYPE_CHECKING, Any

from minimind_mcore import log
from minimind_mcore.errors import UserError
from minimind_mcore.platform.after_import import after_import

if TYPE_CHECKING:
    from minimind_mcore.rl.rewards.rewards import Rewards

logger = logging.getLogger(__name__)


def setup() -> None:
    """Register every change, without importing MindSpeed-RL."""
    log.setup()  # changes only the kit's logger, not MindSpeed-RL's
    for module, patch in PATCHES.items():
        after_import(f"mindspeed_rl.{module}", patch)


def _log(change: str) -> None:
    logger.info(f"minimind: {change}")


# Weights


def add_adaptors(module: ModuleType) -> None:
    """Add adaptors for the classes with which vLLM loads MiniMind's Hugging Face directories."""
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
    """A token id that is true even if it is 0."""

    def __bool__(self) -> bool:
        return True


def keep_pad(module: ModuleType) -> None:
    """Make `tokenizer.pad if tokenizer.pad else tokenizer.eod` use the pad id."""
    cls = module._HuggingFaceTokenizer
    found = cls.pad

    def pad(self: Any) -> PadId | None:
        value = found.fget(self)
        return None if value is None else PadId(value)

    cls.pad = property(pad, found.fset, found.fdel, found.__doc__)
    _log("pad id 0 counts as a pad id")


# Rollout


def roll_out_ids(module: ModuleType) -> None:
    """Pass vLLM the ids that training uses."""
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
    """Do not shuffle forward-only passes, and refuse to divide by a temperature of 0."""
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


def give_profiler(module: ModuleType) -> None:
    """Give every worker the profiler settings that it reads.

    cli/train_grpo.py of master passes them only to the integrated worker, and the separate actor ends with
    "'NoneType' object has no attribute 'role'" (workers/actor_hybrid_worker.py, line 194).
    """
    original = module.BaseWorker.__init__

    @functools.wraps(original)
    def initialize(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        if self.profiler_config is None:
            self.profiler_config = module.ProfilerConfig({}, role="integrated")
        if self.msprobe_config is None:
            self.msprobe_config = module.MsprobeConfig({}, role="integrated")

    module.BaseWorker.__init__ = initialize


# Rewards


# Prompts and lengths of the responses that are being scored. MindSpeed-RL does not pass them to verifiers.
_KNOWN: ContextVar[Mapping[str, Any]] = ContextVar("known", default={})  # noqa: B039 (the default is never modified)


def call_user_rewards(module: ModuleType) -> None:
    """Support verifiers by import path, and refuse unknown names."""
    original, compute = module.verifier, module.compute_verifier_score

    @functools.wraps(original)
    def verifier(responses: Sequence[str], data: Any, config: Any, **kwargs: Any) -> Any:
        from minimind_mcore.rl.config.lint import NEW_VERIFIERS, VERIFIERS

        total, metrics = original(responses, data, config, **kwargs)
        for name, weight in zip(config.verifier_function, config.verifier_weight, strict=True):
            if ":" in name:
                scores, share = _scores(name, responses, data, config)
                metrics[f"{name}_rewards/mean"] = scores
                metrics[f"{name}_rewards/failure_share"] = [share] * len(scores)  # MindSpeed-RL logs means alone
                total = [value + weight * score for value, score in zip(total, scores, strict=True)]
            elif f"{name}_rewards/mean" not in metrics:
                known = ", ".join(sorted(VERIFIERS | NEW_VERIFIERS))
                raise UserError(f"verifier_function {name}: unknown to this MindSpeed-RL (known: {known})")
        return total, metrics

    @functools.wraps(compute)
    def compute_verifier_score(
        batch: Any, megatron: Any, config: Any, tokenizer: Any, *more: Any, **kwargs: Any
    ) -> Any:
        token = _KNOWN.set(_known(batch, tokenizer))
        try:
            return compute(batch, megatron, config, tokenizer, *more, **kwargs)
        finally:
            _KNOWN.reset(token)

    module.verifier, module.compute_verifier_score = verifier, compute_verifier_score  # type: ignore[attr-defined]
    _log("verifiers may be import paths, and unknown ones are errors")


def _known(batch: Mapping[str, Any], tokenizer: Any) -> dict[str, Any]:
    """Return prompts as text without padding, and lengths [B] of the responses, of a batch of MindSpeed-RL."""
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    ids = []
    for row in batch["prompts"]:
        places = (row != pad).nonzero().flatten().tolist() or [0]
        ids.append(row[places[0] : places[-1] + 1].tolist())
    return {"prompts": tokenizer.batch_decode(ids), "lengths": batch["response_length"].flatten()}


def _scores(
    name: str, responses: Sequence[str], data: Mapping[str, Sequence[Any]], config: Any
) -> tuple[list[float], float]:
    """Return the scores of a user's function, and the share of responses that it could not score."""
    columns = {key: list(values) for key, values in data.items() if key not in ("labels", "tool_call_num")}
    calls: dict[str, Any] = {"tool_calls": list(data["tool_call_num"])} if "tool_call_num" in data else {}
    rewards = _rewards(name, config.verifier_timeout, config.verifier_parallel, (*columns, *calls))
    texts = {key: [str(value).strip() for value in values] for key, values in columns.items()}
    labels = [label.strip() for label in data["labels"]]
    scores = rewards.score(list(responses), labels, columns=texts, **_KNOWN.get(), **calls)
    for sample in scores.samples:
        _log(f"a response could not be scored: {sample}")
    return scores.total.tolist(), scores.failures[name] / max(1, len(responses))


@functools.cache
def _rewards(name: str, timeout: float, parallel: int, columns: tuple[str, ...]) -> Rewards:
    """Return the rewards object, cached for its processes and for the share of failures that ends a run."""
    from minimind_mcore.rl.config.schema import MiniMindConfig
    from minimind_mcore.rl.rewards.rewards import Rewards

    limit = MiniMindConfig().reward_failure_limit
    rewards = Rewards([name], [1.0], timeout=timeout, parallel=parallel, max_failures=limit, columns=columns)
    atexit.register(rewards.close)
    return rewards


PATCHES: dict[str, Callable[[ModuleType], None]] = {
    "workers.resharding.weight_adaptor": add_adaptors,
    "utils.tokenizer": keep_pad,
    "models.rollout.vllm_engine": roll_out_ids,
    "models.base.base_training_engine": keep_order,
    "workers.base_worker": give_profiler,
    "models.rule_verifier": call_user_rewards,
}
