"""Settings of a model that its tensors do not determine: the assumed values, and the flags that replace them.

A `.pth` file of MiniMind's trainer holds only tensors. Directories and Megatron checkpoints store these settings, and
flags are compared with the stored values.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from minimind_mcore.errors import UserError
from minimind_mcore.inputs.ranges import RANGES, flag_type
from minimind_mcore.models.config import LOAD_BALANCING, ROUTER_WEIGHTS, ModelConfig

# Flags by field of ModelConfig or MoEConfig. Names are Megatron's if it has such a flag.
FLAGS = {
    "num_layers": "--num-layers",
    "hidden_size": "--hidden-size",
    "num_heads": "--num-attention-heads",
    "norm_eps": "--norm-epsilon",
    "rope_theta": "--rotary-base",
    "max_position_embeddings": "--max-position-embeddings",
    "inference_rope_scaling": "--inference-rope-scaling",
    "topk": "--moe-router-topk",
    "norm_topk_prob": "--norm-topk-prob",
    "router_weight": "--router-weight",
    "load_balancing": "--moe-router-load-balancing-type",
    "aux_loss_coeff": "--moe-aux-loss-coeff",
}
_CHOICES = {"load_balancing": LOAD_BALANCING, "router_weight": ROUTER_WEIGHTS}
_MOE = ("topk", "norm_topk_prob", "router_weight", "load_balancing", "aux_loss_coeff")


@dataclass(frozen=True)
class Assumption:
    """A value that the tensors of a file do not determine. `name` is a field of ModelConfig or MoEConfig."""

    name: str
    value: object

    def __str__(self) -> str:
        return f"{self.name} = {self.value} (replace it with {FLAGS[self.name]})"


def add_flags(group: argparse._ArgumentGroup, known: set[str]) -> None:
    """Add the flags, except those in `known`, which the parser already has."""
    for name, flag in FLAGS.items():
        if flag in known:
            continue
        what = f"{name} of the model; replaces the assumed value of a .pth file, and must match other models"
        dest = flag.removeprefix("--").replace("-", "_")
        if name in _CHOICES:
            group.add_argument(flag, choices=_CHOICES[name], help=what)
        elif dest in RANGES:
            group.add_argument(flag, type=flag_type(dest), help=what)
        else:
            group.add_argument(flag, action=argparse.BooleanOptionalAction, default=None, help=what)


def stated(args: argparse.Namespace, given: Sequence[str]) -> dict[str, object]:
    """Return the values of the flags on a command line, by field."""
    found: dict[str, object] = {}
    for name, flag in FLAGS.items():
        if flag in given or flag.replace("--", "--no-", 1) in given:
            value = getattr(args, flag.removeprefix("--").replace("-", "_"))
            # MindSpeed-LLM's parser reads --rotary-base as a float or an integer.
            found[name] = int(value) if name == "rope_theta" and value == int(value) else value
    return found


def value_of(config: ModelConfig, name: str) -> object:
    """Return a field of a model, or of its mixture of experts (None for a dense model)."""
    found: object = getattr(config.moe, name, None) if name in _MOE else getattr(config, name)
    return "normalized" if name == "router_weight" and config.moe and found is None else found


def compare(config: ModelConfig, values: Mapping[str, object], where: str = "the model") -> None:
    """Check that a model agrees with the flags.

    Raises:
        UserError: a flag has another value.
    """
    for name, value in values.items():
        if (actual := value_of(config, name)) != value:
            raise UserError(f"{FLAGS[name]} {value}: {where} has {actual}")


def described(path: Path | str, assumptions: Sequence[Assumption]) -> list[str]:
    """Return lines that tell a user the assumed values."""
    if not assumptions:
        return []
    head = f"{path}: its tensors do not determine these values, so they are assumed; --hf-cfg-dir replaces all of them:"
    return [head, *(f"  {assumption}" for assumption in assumptions)]
