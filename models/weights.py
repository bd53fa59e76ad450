"""The weight table: one set of rules for both directions between transformers and megatron-core.

        hf_state = mcore_to_hf(mcore, config)      # an error unless every tensor is used

A rule (`rules.py`) names tensors of both formats and converts them in both directions. `rules` returns the rules of a
model. All tensors belong to the whole model: layers and experts are numbered from 0, and no tensor is split. `shard`
and `unshard` split and join one tensor for tensor parallelism. `loading.py` loads tensors into models.

The other format has four forms: `hf`, the files of transformers (Llama, Qwen3, Qwen2-MoE, Qwen3-MoE); `hf_fused`, the
same in the memory of transformers 5, with stacked experts; `native`, MiniMind's own; `legacy`, MiniMind's before
2025-04-26 (v1, and the first MiniMind2).
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from minimind_mcore.errors import UserError
from minimind_mcore.models.config import ModelConfig, MoEConfig
from minimind_mcore.models.hf_config import hf_model_type
from minimind_mcore.models.rules import QKV, Concat, Doubled, InterleavedQKV, Rule, Shape, StackExperts, Zeros

FORMS = ("hf", "hf_fused", "native", "legacy")
EMBEDDING = "embedding.word_embeddings.weight"
OUTPUT = "output_layer.weight"


def rules(config: ModelConfig, form: str = "hf") -> list[Rule]:
    """Return the rules of a model, which cover every tensor of both formats.

    Raises:
        UserError: the form is unknown, or cannot express this model.
    """
    if form not in FORMS:
        raise UserError(f"weight form: found {form!r}, expected one of {FORMS}")
    if form in ("hf", "hf_fused"):
        hf_model_type(config)
    elif config.moe and config.moe.shared_ffn_hidden_size % config.moe.ffn_hidden_size:
        raise UserError("MiniMind's shared experts are as wide as the others; this model's is not a multiple")
    if form == "legacy":
        return [_legacy(rule) for rule in _table(config, "native")]
    return _table(config, form)


# MiniMind's names of today, with the names before 2025-04-26 (commit 274483c renamed them).
_LEGACY_NAMES = (
    (r"^model\.embed_tokens\.", "tok_embeddings."),
    (r"^lm_head\.", "output."),
    (r"^model\.", ""),
    (r"\.self_attn\.([qkvo])_proj\.", r".attention.w\1."),
    (r"\.input_layernorm\.", ".attention_norm."),
    (r"\.post_attention_layernorm\.", ".ffn_norm."),
    (r"\.mlp\.", ".feed_forward."),
    (r"\.shared_experts\.0\.", ".shared_experts."),
    (r"\.gate_proj\.", ".w1."),
    (r"\.down_proj\.", ".w2."),
    (r"\.up_proj\.", ".w3."),
)


def legacy_name(name: str) -> str:
    """Return MiniMind's name of a tensor before 2025-04-26."""
    for pattern, replacement in _LEGACY_NAMES:
        name = re.sub(pattern, replacement, name)
    return name


def _legacy(rule: Rule) -> Rule:
    fields = {field.name: getattr(rule, field.name) for field in dataclasses.fields(rule)}
    fields["hf"] = tuple(map(legacy_name, rule.hf))
    return (InterleavedQKV if isinstance(rule, QKV) else type(rule))(**fields)


def _table(config: ModelConfig, form: str) -> list[Rule]:
    h, vocab = config.hidden_size, (config.vocab_size, config.hidden_size)
    table = [_same(EMBEDDING, "model.embed_tokens.weight", vocab)]
    if config.tie_embeddings:
        # State dicts and MiniMind's .pth files list a tied tensor twice; safetensors files list it once.
        table.append(
            Rule(mcore=(EMBEDDING,), hf=("lm_head.weight",), shapes=(vocab,), required=False, written=form == "native")
        )
    else:
        table.append(_same(OUTPUT, "lm_head.weight", vocab))
    for layer in range(config.num_layers):
        ours, theirs = f"decoder.layers.{layer}.", f"model.layers.{layer}."
        table += _attention_rules(config, ours, theirs)
        table.append(_same(ours + "input_layernorm.weight", theirs + "input_layernorm.weight", (h,)))
        table.append(_same(ours + "pre_mlp_layernorm.weight", theirs + "post_attention_layernorm.weight", (h,)))
        if config.moe is None:
            table += _mlp_rules(ours + "mlp", [theirs + "mlp"], h, config.ffn_hidden_size)
        else:
            table += _moe_rules(config.moe, h, ours + "mlp", theirs + "mlp", form)
            if form != "native" and config.moe.shared_ffn_hidden_size:
                table += _qwen2_moe_zeros(config, theirs)
    table.append(_same("decoder.final_layernorm.weight", "model.norm.weight", (h,)))
    return table


def _same(ours: str, theirs: str, shape: Shape) -> Rule:
    return Rule(mcore=(ours,), hf=(theirs,), shapes=(shape,))


def _attention_rules(config: ModelConfig, ours: str, theirs: str) -> list[Rule]:
    h, d = config.hidden_size, config.head_dim
    q, kv = (config.num_heads * d, h), (config.num_kv_heads * d, h)
    ours, theirs = ours + "self_attention.", theirs + "self_attn."
    table: list[Rule] = [
        QKV(
            mcore=(ours + "linear_qkv.weight",),
            hf=tuple(f"{theirs}{x}_proj.weight" for x in "qkv"),
            shapes=(q, kv, kv),
            kv_heads=config.num_kv_heads,
        ),
        _same(ours + "linear_proj.weight", theirs + "o_proj.weight", (h, q[0])),
    ]
    if config.qk_layernorm:
        table += [_same(f"{ours}{x}_layernorm.weight", f"{theirs}{x}_norm.weight", (d,)) for x in "qk"]
    return table


def _mlp_rules(ours: str, theirs: Sequence[str], h: int, ffn: int) -> list[Rule]:
    """Convert one MLP, or several with the same input whose outputs are added: these are one wider MLP."""
    names = [f"{mlp}.{x}_proj.weight" for x in ("gate", "up") for mlp in theirs]
    outputs = Rule(
        mcore=(ours + ".linear_fc2.weight",),
        hf=tuple(f"{mlp}.down_proj.weight" for mlp in theirs),
        shapes=((h, ffn),) * len(theirs),
    )
    if len(theirs) > 1:
        outputs = Concat(mcore=outputs.mcore, hf=outputs.hf, shapes=outputs.shapes, axis=1)
    return [
        Concat(mcore=(ours + ".linear_fc1.weight",), hf=tuple(names), shapes=((ffn, h),) * len(names), axis=0),
        outputs,
    ]


def _moe_rules(moe: MoEConfig, h: int, ours: str, theirs: str, form: str) -> list[Rule]:
    ffn, shared = moe.ffn_hidden_size, moe.shared_ffn_hidden_size
    table = [_same(ours + ".router.weight", theirs + ".gate.weight", (moe.num_experts, h))]
    experts = [f"{ours}.experts.local_experts.{e}" for e in range(moe.num_experts)]
    if form == "hf_fused":
        for fc, name, shape in (("fc1", "gate_up_proj", (2 * ffn, h)), ("fc2", "down_proj", (h, ffn))):
            mcore = tuple(f"{expert}.linear_{fc}.weight" for expert in experts)
            table.append(
                StackExperts(mcore=mcore, hf=(f"{theirs}.experts.{name}",), shapes=((moe.num_experts, *shape),))
            )
    else:
        for e, expert in enumerate(experts):
            table += _mlp_rules(expert, [f"{theirs}.experts.{e}"], h, ffn)
    if shared and form == "native":
        count = shared // ffn
        table += _mlp_rules(
            ours + ".shared_experts", [f"{theirs}.shared_experts.{i}" for i in range(count)], h, shared // count
        )
    elif shared:
        fc1, fc2 = _mlp_rules(ours + ".shared_experts", [theirs + ".shared_expert"], h, shared)
        table += [fc1, Doubled(mcore=fc2.mcore, hf=fc2.hf, shapes=fc2.shapes)]
    return table


def _qwen2_moe_zeros(config: ModelConfig, theirs: str) -> list[Rule]:
    rows = {"q": config.num_heads * config.head_dim, "k": config.num_kv_heads * config.head_dim}
    rows["v"] = rows["k"]
    shapes: dict[str, Shape] = {f"{theirs}self_attn.{x}_proj.bias": (n,) for x, n in rows.items()}
    shapes[theirs + "mlp.shared_expert_gate.weight"] = (1, config.hidden_size)
    return [Zeros(mcore=(), hf=(name,), shapes=(shape,), required=False) for name, shape in shapes.items()]


def detect_form(names: Iterable[str]) -> str:
    """Infer the form of a state dict from its names. Dense models have only one form."""
    names = list(names)
    if any(name.endswith("mlp.experts.gate_up_proj") for name in names):
        return "hf_fused"
    if any(".attention.wq." in name for name in names):
        return "legacy"
    # Without a shared expert, MiniMind's own names equal those of Qwen3-MoE.
    return "native" if any(".shared_experts." in name for name in names) else "hf"


def mcore_to_hf(state: Mapping[str, Tensor], config: ModelConfig, form: str = "hf") -> dict[str, Tensor]:
    """Convert a whole megatron-core model to a state dict of transformers or MiniMind.

    The result may share memory with `state`.

    Raises:
        UserError: a tensor is missing, unknown, or has a wrong shape.
    """
    shapes = mcore_shapes(config)
    account(state, set(shapes), set(shapes))
    found = dict(stream_to_hf(state.items(), config, form))
    return {name: found[name] for rule in rules(config, form) if rule.written for name in rule.hf}


def stream_to_hf(
    tensors: Iterable[tuple[str, Tensor]], config: ModelConfig, form: str = "hf"
) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of `mcore_to_hf`, each as soon as all its inputs have arrived.

    An input is released after its last use, so that a large model needs little memory.

    Args:
        tensors: names and tensors of a whole megatron-core model, in any order.
        config: the architecture.
        form: one of `FORMS`.

    Raises:
        UserError: a tensor is missing, unknown, or has a wrong shape.
    """
    table = [rule for rule in rules(config, form) if rule.written]
    shapes = mcore_shapes(config)
    readers: dict[str, list[int]] = {name: [] for name in shapes}
    for number, rule in enumerate(table):
        for name in rule.mcore:
            readers[name].append(number)
    missing = [set(rule.mcore) for rule in table]
    waiting: dict[str, Tensor] = {}
    seen: set[str] = set()
    dtype = torch.get_default_dtype()
    for name, tensor in tensors:
        account({name: tensor}, set(), set(shapes))
        check_shape(name, tensor, shapes[name])
        seen.add(name)
        waiting[name] = tensor
        dtype = tensor.dtype if name == EMBEDDING else dtype
        for number in readers[name]:
            rule = table[number]
            missing[number].discard(name)
            if not missing[number]:
                yield from zip(rule.hf, rule.to_hf([waiting[part] for part in rule.mcore]), strict=True)
        for part in {part for number in readers[name] for part in table[number].mcore}:
            if not any(missing[number] for number in readers[part]):
                waiting.pop(part, None)
    account(dict.fromkeys(seen), set(shapes), set(shapes))
    for rule in table:
        if isinstance(rule, Zeros):
            yield from zip(rule.hf, [zeros.to(dtype) for zeros in rule.to_hf([])], strict=True)


def mcore_shapes(config: ModelConfig) -> dict[str, Shape]:
    """Return names and shapes of the whole megatron-core model."""
    shapes: dict[str, Shape] = {}
    for rule in _table(config, "hf"):
        shapes |= dict(zip(rule.mcore, rule.mcore_shapes, strict=True))
    return shapes


def account(state: Mapping[str, object], required: set[str], known: set[str]) -> None:
    """Raise a `UserError` that lists the missing and the unknown names of a table of tensors."""
    problems = [
        f"{len(names)} {kind} tensors: {', '.join(sorted(names)[:4])}{', ...' if len(names) > 4 else ''}"
        for kind, names in (("missing", required - state.keys()), ("unknown", state.keys() - known))
        if names
    ]
    if problems:
        raise UserError(f"the weights do not fit the model config: {'; '.join(problems)}")


def check_shape(name: str, tensor: HasShape, expected: Shape) -> None:
    """Raise a `UserError` if the tensor has another shape."""
    if tuple(tensor.shape) != expected:
        raise UserError(f"{name}: found shape {tuple(tensor.shape)}, expected {expected} from the model config")


# How tensor parallelism splits a tensor: the axis, and the number of blocks along it that are split separately. (The
# MLP's first matrix is [gate; up], and every rank has a shard of both.) All other tensors are replicated.
_SPLITS = {
    "word_embeddings.weight": (0, 1),
    "output_layer.weight": (0, 1),
    "linear_qkv.weight": (0, 1),
    "linear_proj.weight": (1, 1),
    "linear_fc1.weight": (0, 2),
    "linear_fc2.weight": (1, 1),
}


class HasShape(Protocol):
    """A tensor, or an object that represents one."""

    @property
    def shape(self) -> Shape:
        """The shape of the tensor."""
        ...


def is_split(name: str) -> bool:
    """Return whether tensor parallelism splits a tensor of this name. All others are replicated."""
    return _split(name) is not None


def _split(name: str) -> tuple[int, int] | None:
    return _SPLITS.get(".".join(name.split(".")[-2:]))


def shard(name: str, tensor: Tensor, tp_rank: int, tp_size: int) -> Tensor:
    """Return a tensor-parallel rank's shard of a whole megatron-core tensor (a view where possible).

    Raises:
        UserError: the tensor cannot be split evenly.
    """
    split = _split(name)
    if split is None or tp_size == 1:
        return tensor
    shard_shape(name, tuple(tensor.shape), tp_size)
    axis, blocks = split
    parts = [block.chunk(tp_size, dim=axis)[tp_rank] for block in tensor.chunk(blocks, dim=axis)]
    return parts[0] if blocks == 1 else torch.cat(parts, dim=axis)


def shard_shape(name: str, shape: Shape, tp_size: int) -> Shape:
    """Return the shape of the result of `shard`. Raises as `shard` does."""
    split = _split(name)
    if split is None or tp_size == 1:
        return shape
    axis, blocks = split
    if shape[axis] % (blocks * tp_size):
        raise UserError(f"{name}: axis {axis} of {shape} does not divide by a TP size of {tp_size}")
    return (*shape[:axis], shape[axis] // tp_size, *shape[axis + 1 :])


def unshard(name: str, tensors: Sequence[Tensor]) -> Tensor:
    """Join the shards of all ranks, in order, to the whole tensor. The inverse of `shard`."""
    split = _split(name)
    if split is None or len(tensors) == 1:
        return tensors[0]
    axis, blocks = split
    parts = [tensor.chunk(blocks, dim=axis) for tensor in tensors]
    return torch.cat([part[block] for block in range(blocks) for part in parts], dim=axis)
