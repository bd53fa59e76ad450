"""The architecture of a Megatron checkpoint: sizes from its tensors, the rest from the arguments that it carries."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from minimind_mcore.checkpoint.layout import Sharding
from minimind_mcore.errors import UserError
from minimind_mcore.models import weights
from minimind_mcore.models.config import ModelConfig, MoEConfig, named_router_weight

Shapes = Mapping[str, tuple[int, ...]]
# What no shape tells; MindSpeed-LLM's converter names some otherwise or leaves them out.
_SETTINGS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("num_heads", ("num_attention_heads",)),
    ("num_kv_heads", ("num_query_groups", "num_attention_heads")),
    ("norm_eps", ("norm_epsilon", "layernorm_epsilon")),
    ("rope_theta", ("rotary_base",)),
    ("max_position_embeddings", ("max_position_embeddings",)),
)


def model_config(
    directory: Path,
    args: argparse.Namespace,
    sharding: Sharding,
    shapes: Shapes,
    given: ModelConfig | None,
) -> ModelConfig:
    """The architecture.

    Args:
        directory: for messages.
        args: of the checkpoint.
        sharding: its layout.
        shapes: of tensors of its files, by name.
        given: where the arguments may be incomplete, the architecture that they belong to.

    Raises:
        UserError: something is neither in the arguments nor given, or they contradict each other.
    """
    rows = _size(directory, shapes, weights.EMBEDDING, 0) * sharding.tp
    if given is not None:
        _compare(directory, args, sharding, given)
        return given.replace(vocab_size=rows)
    values: dict[str, Any] = {name: _first(directory, args, names) for name, names in _SETTINGS}
    hidden = _size(directory, shapes, weights.EMBEDDING, 1)
    experts = _shape(shapes, "mlp.router.weight")
    dense = _shape(shapes, ".mlp.linear_fc1.weight")
    ffn = dense[0] * sharding.tp // 2 if dense else None
    width = getattr(args, "moe_ffn_hidden_size", None) or getattr(args, "moe_intermediate_size", None)
    # grouped experts have one shape for all, and the number is known
    expert = _shape(shapes, ".local_experts.0.linear_fc1.weight")
    width = expert[0] * sharding.tp // 2 if expert else width
    return ModelConfig(
        **values | {"rope_theta": int(values["rope_theta"])},
        vocab_size=rows,
        hidden_size=hidden,
        num_layers=args.num_layers - len(sharding.noop_layers),
        head_dim=getattr(args, "kv_channels", None) or hidden // values["num_heads"],
        ffn_hidden_size=ffn or getattr(args, "ffn_hidden_size", None) or width or 0,
        qk_layernorm=_shape(shapes, "q_layernorm.weight") is not None,
        inference_rope_scaling=bool(getattr(args, "inference_rope_scaling", False)),
        tie_embeddings=not getattr(args, "untie_embeddings_and_output_weights", False),
        moe=_experts(directory, args, sharding, shapes, experts[0], width) if experts else None,
    )


def _experts(
    directory: Path, args: argparse.Namespace, sharding: Sharding, shapes: Shapes, count: int, width: int | None
) -> MoEConfig:
    if width is None:
        raise _unknown(directory, "moe_ffn_hidden_size")
    topk = _first(directory, args, ("moe_router_topk",))
    shared = _shape(shapes, "shared_experts.linear_fc1.weight")
    balancing = getattr(args, "moe_router_load_balancing_type", "aux_loss")
    return MoEConfig(
        num_experts=count,
        topk=topk,
        ffn_hidden_size=width,
        shared_ffn_hidden_size=shared[0] * sharding.tp // 2 if shared else 0,
        router_weight=named_router_weight(args),
        load_balancing=balancing if isinstance(balancing, str) else "aux_loss",
        aux_loss_coeff=getattr(args, "moe_aux_loss_coeff", 0.0),
    )


def _compare(directory: Path, args: argparse.Namespace, sharding: Sharding, given: ModelConfig) -> None:
    """Refuse a config that is not this checkpoint's; what shapes tell is compared later, tensor by tensor."""
    expected: dict[str, Any] = {names[0]: getattr(given, name) for name, names in _SETTINGS[:4]}
    expected |= {"num_layers": sharding.places(given), "kv_channels": given.head_dim}
    expected["untie_embeddings_and_output_weights"] = not given.tie_embeddings
    expected["inference_rope_scaling"] = given.inference_rope_scaling  # of converted checkpoints; training says nothing
    if given.moe:
        expected |= {"num_experts": given.moe.num_experts, "moe_router_topk": given.moe.topk}
    for name, value in expected.items():
        found = getattr(args, name, None)
        if found is not None and found != value:
            raise UserError(f"{directory}: {name} is {found} in the checkpoint and {value} in the given config")


def _first(directory: Path, args: argparse.Namespace, names: tuple[str, ...]) -> Any:
    for name in names:
        if getattr(args, name, None) is not None:
            return getattr(args, name)
    raise _unknown(directory, names[0])


def _unknown(directory: Path, name: str) -> UserError:
    return UserError(f"{directory}: the checkpoint does not say {name}; give the model's config.json with --hf-cfg-dir")


def _shape(shapes: Shapes, ending: str) -> tuple[int, ...] | None:
    return next((shape for name, shape in shapes.items() if name.endswith(ending)), None)


def _size(directory: Path, shapes: Shapes, ending: str, axis: int) -> int:
    shape = _shape(shapes, ending)
    if shape is None:
        raise UserError(f"{directory}: no {ending} in it: not a checkpoint of a language model")
    return shape[axis]
