"""The type and the range of every number that a user gives, in one table.

    problem("num_layers", 0)                       # "found 0, expected 1 to 1024"
    parser.add_argument("--keep-last", type=flag_type("keep_last"))

Flags, the YAML of reinforcement learning and `config.json` share the names of the table: those of Megatron's
arguments. `config.json` has other names for some fields; `models/hf_config.py` maps these. A key such as
"sampling_config.temperature" holds for that section of the YAML only. Numbers that are not in the table must be
finite and fit into 64 bits.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

Number = int | float


@dataclass(frozen=True)
class Range:
    """The values that a field can have.

    Attributes:
        kind: int, or float (for which an integer will do).
        low: the least value; None: any.
        high: the largest value; None: any.
        above: `low` itself is not allowed.
        below: `high` itself is not allowed.
        hint: what to do instead, appended to the message.
    """

    kind: type[int] | type[float]
    low: Number | None = None
    high: Number | None = None
    above: bool = False
    below: bool = False
    hint: str = ""

    def problem(self, value: object) -> str | None:
        """Say what is wrong with a value; None if nothing is."""
        if isinstance(value, bool) or not isinstance(value, int if self.kind is int else int | float):
            return f"found {value!r}, expected {'a whole number' if self.kind is int else 'a number'}"
        if not _fits(value):
            return f"found {_shown(value)}, expected {self} (a finite number that fits into 64 bits){self.hint}"
        low = self.low is None or (value > self.low if self.above else value >= self.low)
        high = self.high is None or (value < self.high if self.below else value <= self.high)
        return None if low and high else f"found {value}, expected {self}{self.hint}"

    def __str__(self) -> str:
        if self.low is None or self.high is None:
            least = f"more than {self.low}" if self.above else f"{self.low} or more"
            return "any number" if self.low is None else least
        if self.above:
            return f"more than {self.low}, {'less than' if self.below else 'at most'} {self.high}"
        return f"{self.low} to {'less than ' if self.below else ''}{self.high}"


def _fits(value: Number) -> bool:
    return -(2**63) <= value < 2**63 if isinstance(value, int) else math.isfinite(value)


def _shown(value: Number) -> str:
    """A number of a length that a message can hold: Python refuses to print integers of thousands of digits."""
    if isinstance(value, int) and value.bit_length() > 128:
        return f"a number of {value.bit_length()} bits"
    return str(value)


ANY = {int: Range(int), float: Range(float)}
_COUNT, _NATURAL = Range(int, 1), Range(int, 0)  # 1 or more, 0 or more
_SHARE, _POSITIVE, _NONNEGATIVE = Range(float, 0, 1), Range(float, 0, above=True), Range(float, 0)
_PROBABILITY = Range(float, 0, 1, above=True)
_RATE = Range(float, 0, 1000)  # of learning; a larger one is a slip of the keyboard
# The limits of sizes are far above every model that was published. They keep a wrong digit in a file from work that
# does not end: names of tensors are listed per layer and expert.
_WIDTH, _ROWS, _TOKENS = Range(int, 1, 1 << 20), Range(int, 1, 1 << 24), Range(int, 1, 1 << 26)

RANGES: dict[str, Range] = {
    # the model
    "num_layers": Range(int, 1, 1024),
    "hidden_size": _WIDTH,
    "ffn_hidden_size": _WIDTH,
    "num_attention_heads": Range(int, 1, 1 << 16),
    "num_query_groups": Range(int, 1, 1 << 16),
    "kv_channels": Range(int, 1, 1 << 16),
    "vocab_size": _ROWS,
    "padded_vocab_size": _ROWS,
    "true_vocab_size": _ROWS,
    "make_vocab_size_divisible_by": Range(int, 1, 1 << 20),
    "max_position_embeddings": _TOKENS,
    "rotary_base": Range(int, 2, 10**12),
    "norm_epsilon": Range(float, 0, 1, above=True),
    "init_method_std": Range(float, 0, 100, above=True),
    "attention_dropout": Range(float, 0, 1, below=True),
    "hidden_dropout": Range(float, 0, 1, below=True),
    "num_experts": Range(int, 1, 1024),
    "moe_router_topk": Range(int, 1, 1024),
    "moe_ffn_hidden_size": _WIDTH,
    "moe_shared_expert_intermediate_size": Range(int, 0, 1 << 20),
    "n_shared_experts": Range(int, 0, 1024),
    "moe_aux_loss_coeff": Range(float, 0, 1000),
    "moe_z_loss_coeff": Range(float, 0, 1000),
    "lora_r": Range(int, 1, 1 << 16),
    "lora_alpha": _POSITIVE,
    # the layout
    "tensor_model_parallel_size": _COUNT,
    "pipeline_model_parallel_size": _COUNT,
    "context_parallel_size": _COUNT,
    "expert_model_parallel_size": _COUNT,
    "target_tensor_parallel_size": _COUNT,
    "target_pipeline_parallel_size": _COUNT,
    "target_expert_parallel_size": _COUNT,
    "num_layers_per_virtual_pipeline_stage": _COUNT,
    "ddp_bucket_size": _COUNT,
    "distributed_timeout_minutes": Range(int, 1, 1 << 20),
    "recompute_num_layers": _COUNT,
    # the run
    "seq_length": _TOKENS,
    "micro_batch_size": _COUNT,
    "global_batch_size": _COUNT,
    "train_iters": _COUNT,
    "train_samples": _COUNT,
    "eval_iters": _NATURAL,
    "eval_interval": _COUNT,
    "log_interval": _COUNT,
    "save_interval": _COUNT,
    "exit_interval": _COUNT,
    "exit_duration_in_mins": _NATURAL,
    "keep_last": _COUNT,
    "ckpt_step": _NATURAL,
    "seed": Range(int, 0, 2**32 - 1),  # numpy's generators take no other
    "num_workers": Range(int, 0, 1024),
    "num_dataset_builder_threads": Range(int, 1, 1024),
    "pad_to_multiple_of": Range(int, 1, 1 << 20),
    # the optimizer and its schedule
    "lr": _RATE,
    "min_lr": _RATE,
    "lr_warmup_init": _RATE,
    "lr_warmup_fraction": Range(float, 0, 1, below=True),
    "lr_warmup_iters": _NATURAL,
    "lr_decay_iters": _COUNT,
    "lr_wsd_decay_iters": _COUNT,
    "weight_decay": Range(float, 0, 1000),
    "start_weight_decay": Range(float, 0, 1000),
    "end_weight_decay": Range(float, 0, 1000),
    "clip_grad": _NONNEGATIVE,
    "adam_beta1": Range(float, 0, 1, below=True),
    "adam_beta2": Range(float, 0, 1, below=True),
    "adam_eps": Range(float, 0, 1, above=True),
    "sgd_momentum": Range(float, 0, 1, below=True),
    "loss_scale": _POSITIVE,
    "initial_loss_scale": _POSITIVE,
    "min_loss_scale": _POSITIVE,
    "loss_scale_window": _POSITIVE,
    "hysteresis": _COUNT,
    # post-training
    "dpo_beta": _POSITIVE,
    "dpo_label_smoothing": Range(
        float, 0, 0.5, below=True, hint=", the share of pairs whose preference is believed to be the other way round"
    ),
    "pref_ftx": _NONNEGATIVE,
    "gamma_beta_ratio": _NONNEGATIVE,
    "distill_alpha": _SHARE,
    "distill_temperature": _POSITIVE,
    # data and conversion
    "workers": Range(int, 1, 4096),
    "n_subs": Range(int, 1, 1 << 20),
    "max_reject_rate": _SHARE,
    "system_ratio": _SHARE,
    "empty_think_ratio": _SHARE,
    "thinking_ratio": _SHARE,
    "max_shard_size": Range(float, 0, 1 << 20, above=True),
    "epochs": _COUNT,
    "data_parallel_size": _COUNT,
    "token id": Range(int, 0, (1 << 24) - 1),
    # generation and evaluation
    "max_new_tokens": _TOKENS,
    "temperature": Range(float, 0, above=True, hint=" (for the likeliest token use --task greedy)"),
    "top_k": _NATURAL,
    "top_p": _PROBABILITY,
    "repetition_penalty": _POSITIVE,
    "prompt_batch_size": Range(int, 1, 1 << 20),
    "evaluation_batch_size": Range(int, 1, 1 << 20),
    "max_eval_samples": _COUNT,
    "num_fewshot": Range(int, 0, 1 << 20),
    "history_turns": _NATURAL,
    # reinforcement learning
    "nodes": Range(int, 1, 1 << 16),
    "num_npus": _NATURAL,
    "n_samples_per_prompt": _COUNT,
    "mini_batch_size": _COUNT,
    "max_prompt_length": _COUNT,
    "verifier_parallel": _COUNT,
    "verifier_timeout": Range(int, 0, above=True),
    "verifier_weight": ANY[float],
    "filter_groups_max_batches": _COUNT,
    "filter_groups_train_batch_size": _COUNT,
    "overlong_buffer": _NATURAL,
    "overlong_buffer_penalty_factor": _NONNEGATIVE,
    "clip_ratio": _NONNEGATIVE,
    "clip_ratio_low": _NONNEGATIVE,
    "clip_ratio_high": _NONNEGATIVE,
    "cliprange_value": _NONNEGATIVE,
    "entropy_coeff": ANY[float],
    "gamma": _SHARE,
    "lam": _SHARE,
    "init_kl_coef": _NONNEGATIVE,
    "kl_horizon": Range(int, 0, above=True),
    "kl_target": _POSITIVE,
    "max_num_seqs": _COUNT,
    "max_model_len": _COUNT,
    "gpu_memory_utilization": _PROBABILITY,
    "sampling_config.max_tokens": _COUNT,
    "sampling_config.min_p": _SHARE,
    "sampling_config.top_k": Range(int, -1),  # vLLM: -1 and 0 mean all
    "sampling_config.temperature": Range(float, 0, above=True, hint=": log-probabilities are divided by it"),
    "sampling_config.seed": Range(int, 0, 2**32 - 1),
    "minimind.cispo_clip": _POSITIVE,
    "minimind.spo_half_life": _POSITIVE,
    "minimind.spo_rho": _SHARE,
    "minimind.rollout_correction_cap": _POSITIVE,
    "minimind.weight_check_interval": _NATURAL,
    "minimind.reward_model_range": _POSITIVE,
    "minimind.reward_failure_limit": _SHARE,
    "minimind.eval_interval": _NATURAL,
    "minimind.eval_prompts": _COUNT,
    "minimind.sample_interval": _NATURAL,
    "minimind.actor_timeout_s": _POSITIVE,
    "minimind.cluster_wait_s": _NONNEGATIVE,
    "minimind.max_restarts": _NATURAL,
}


def find(name: str, section: str = "") -> Range | None:
    """The range of a field: that of its section, else that of the name; None for names that are not in the table."""
    return RANGES.get(f"{section}.{name}") or RANGES.get(name)


def problem(name: str, value: object, section: str = "") -> str | None:
    """Say what is wrong with a field's value; None if nothing is, or if the value is no number and has no range."""
    if found := find(name, section):
        return found.problem(value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return ANY[int if isinstance(value, int) else float].problem(value)


def problems(args: argparse.Namespace) -> Iterator[tuple[str, str]]:
    """The fields of parsed arguments that are out of their ranges, and what is wrong; None means not given."""
    for name in RANGES:
        value = getattr(args, name, None)
        if value is not None and (wrong := problem(name, value)):
            yield name, wrong


def flag_type(name: str, kind: type[int] | type[float] | None = None) -> Callable[[str], Number]:
    """The `type` of a flag for argparse, which then names the flag in its message.

    Args:
        name: the flag's dest.
        kind: int or float, for a flag that is not in the table or is read as another type than the table's.
    """
    found = RANGES.get(name) or ANY[kind or float]
    parsed: type[int] | type[float] = kind or found.kind

    def parse(text: str) -> Number:
        value = parsed(text)
        if wrong := found.problem(value):
            raise argparse.ArgumentTypeError(wrong)
        return value

    parse.__name__ = parsed.__name__  # argparse: "invalid int value"
    return parse
