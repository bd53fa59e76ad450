"""The frozen configuration of a MiniMind architecture, and the values derived from it.

    >>> from minimind_mcore.models.presets import get_preset
    >>> get_preset("minimind3").num_parameters()
    63912192

A `ModelConfig` covers every generation: MiniMind2 is a Llama, minimind-3 is a Qwen3 (with norms on queries and keys),
and both can replace the MLP by a mixture of experts. A `ModelConfig` converts to megatron-core's `TransformerConfig`,
to Megatron flags and to a transformers config, and can be read back from the last two. This module imports neither
torch nor megatron nor transformers, because shell scripts call it and must start fast.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from minimind_mcore.errors import UserError, naming
from minimind_mcore.inputs.ranges import problem

if TYPE_CHECKING:
    from megatron.core.transformer import TransformerConfig
    from transformers import PretrainedConfig

LOAD_BALANCING = ("aux_loss", "seq_aux_loss", "none")
RouterWeight = Literal["normalized", "softmax", "straight_through"]
ROUTER_WEIGHTS: tuple[RouterWeight, ...] = get_args(RouterWeight)
_SPEC_MODULE = "minimind_mcore.models.minimind_spec"
# Values of `--spec`. MindSpeed-LLM has no argument for the router weight. The second layer spec makes MindSpeed-LLM
# train `straight_through`, and MindSpeed-LLM's checkpoints store `--spec`, so the router weight is in them.
LAYER_SPEC = [_SPEC_MODULE, "layer_spec"]
STRAIGHT_THROUGH_SPEC = [_SPEC_MODULE, "straight_through_layer_spec"]
NO_EXPERTS = "--router-weight: the model has no experts (--num-experts); leave the flag out (ROUTER_WEIGHT)"
# Names of the fields in the table of ranges (`inputs/ranges.py`).
_MODEL_FIELDS = {
    "vocab_size": "padded_vocab_size",
    "hidden_size": "hidden_size",
    "num_layers": "num_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_query_groups",
    "head_dim": "kv_channels",
    "ffn_hidden_size": "ffn_hidden_size",
    "norm_eps": "norm_epsilon",
    "rope_theta": "rotary_base",
    "max_position_embeddings": "max_position_embeddings",
}
_MOE_FIELDS = {
    "num_experts": "num_experts",
    "topk": "moe_router_topk",
    "ffn_hidden_size": "moe_ffn_hidden_size",
    "shared_ffn_hidden_size": "moe_shared_expert_intermediate_size",
    "aux_loss_coeff": "moe_aux_loss_coeff",
}


def _require_ranges(config: object, fields: Mapping[str, str]) -> None:
    for field, name in fields.items():
        if wrong := problem(name, getattr(config, field)):
            raise UserError(f"{field} of the model: {wrong}")


@dataclass(frozen=True, kw_only=True)
class MoEConfig:
    """The mixture of experts that replaces the MLP of every layer.

    Scores are a softmax over all experts. Each token goes to its `topk` best experts. No token is dropped.
    A shared expert, if any, is added for every token with weight 1. `router_weight` is the rule that computes
    the weights of the experts' outputs from the scores:

    - `normalized`: the scores divided by their sum. With one expert per token the weight is always 1, so the
      language-model loss gives the router no gradient.
    - `softmax`: the scores.
    - `straight_through`, only for one expert per token: the weight is 1, with the gradient of the score. The
      forward pass equals `normalized`.
    - None: the flags, config or checkpoint name no rule, and `normalized` is assumed. Training from random weights
      uses `default_router_weight`.

    `norm_topk_prob` is the corresponding key of transformers and vLLM. It is False for `softmax` and True for the
    other rules. It describes only the forward pass, so it cannot distinguish `normalized` from `straight_through`.

    The auxiliary loss of a layer is `aux_loss_coeff * E * sum_i f_i P_i`. `f_i` is expert i's share of the
    token-to-expert assignments, and `P_i` its mean score, both over the micro-batch (`aux_loss`), or over each
    sequence and then averaged (`seq_aux_loss`). minimind-3 does not divide `f_i` by `topk`, so the coefficient
    here is minimind-3's coefficient times `topk`.
    """

    num_experts: int = 4
    topk: int
    ffn_hidden_size: int
    shared_ffn_hidden_size: int = 0
    norm_topk_prob: bool = True
    router_weight: RouterWeight | None = None
    load_balancing: str
    aux_loss_coeff: float

    def __post_init__(self) -> None:
        _require_ranges(self, _MOE_FIELDS)
        if self.topk > self.num_experts:
            raise UserError(f"experts per token: found {self.topk}, expected 1 to num_experts={self.num_experts}")
        if self.load_balancing not in LOAD_BALANCING:
            raise UserError(f"load balancing: found {self.load_balancing!r}, expected one of {LOAD_BALANCING}")
        if self.router_weight not in (None, *ROUTER_WEIGHTS):
            raise UserError(f"router_weight: found {self.router_weight!r}, expected one of {', '.join(ROUTER_WEIGHTS)}")
        if self.router_weight == "straight_through" and self.topk > 1:
            raise UserError(straight_through_needs_one(self.topk))
        if self.router_weight == "softmax":
            object.__setattr__(self, "norm_topk_prob", False)
        elif not self.norm_topk_prob and self.router_weight is None:
            object.__setattr__(self, "router_weight", "softmax")
        elif not self.norm_topk_prob:
            raise UserError(
                f"router_weight is {self.router_weight} and norm_topk_prob is False. They contradict each other: "
                "softmax needs norm_topk_prob False, normalized and straight_through need True. Correct the wrong one"
            )


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A MiniMind decoder: pre-norm, RMSNorm, SwiGLU, RoPE (rotate-half), grouped queries, no biases.

    Sizes are sizes of the whole model, not of one rank's shard. `vocab_size` is the number of rows of the embedding.
    `rope_theta` is an integer because Megatron's `--rotary-base` accepts only integers. `inference_rope_scaling`
    enables MiniMind's YaRN (`yarn.py`). Megatron has no flag for YaRN, and training runs without it.
    `unpadded_head_dim` is the head size of training, if the heads are padded with zeros for an engine without kernels
    for that size (`checkpoint/padding.py`).
    """

    vocab_size: int = 6400
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_hidden_size: int
    qk_layernorm: bool
    norm_eps: float
    rope_theta: int = 1_000_000
    max_position_embeddings: int = 32768
    tie_embeddings: bool = True
    inference_rope_scaling: bool = False
    unpadded_head_dim: int | None = None
    moe: MoEConfig | None = None

    def __post_init__(self) -> None:
        _require_ranges(self, _MODEL_FIELDS)
        if self.num_heads % self.num_kv_heads:
            raise UserError(
                f"num_heads={self.num_heads} is not a multiple of num_kv_heads={self.num_kv_heads}: "
                "each key-value head serves the same number of query heads"
            )
        if self.head_dim % 2:
            raise UserError(f"head_dim: found {self.head_dim}, expected an even number (RoPE rotates pairs)")
        unpadded = self.unpadded_head_dim
        if unpadded is not None and (unpadded % 2 or not 0 < unpadded < self.head_dim):
            raise UserError(f"unpadded_head_dim: found {unpadded}, expected an even number below {self.head_dim}")

    @property
    def rotary_base(self) -> float:
        """The base of the rotary embedding over `head_dim`.

        Padded heads keep their frequencies: theta' ^ (-2i / head_dim) equals rope_theta ^ (-2i / unpadded_head_dim).
        """
        return math.pow(self.rope_theta, self.head_dim / (self.unpadded_head_dim or self.head_dim))

    def require_unpadded(self) -> None:
        """Raise a `UserError` if the heads are padded."""
        if self.unpadded_head_dim:
            raise UserError(
                f"the heads of this model are padded from {self.unpadded_head_dim} to {self.head_dim} "
                "(unpadded_head_dim of its config.json). A padded model is for inference from a Hugging Face "
                "directory; training and other formats need the model from which it was converted"
            )

    # Sizes

    def num_parameters(self) -> int:
        """Return the number of parameters. A tied embedding counts once."""
        experts = self.moe.num_experts if self.moe else 1
        return self._embedding_parameters() + self._layer_parameters(experts)

    def num_adapter_parameters(self, rank: int, targets: Sequence[str], tp: int = 1, pp: int = 1) -> int:
        """Return the number of parameters of LoRA adapters of rank `rank` on megatron-core's layers named in `targets`.

        With `tp` and `pp` the parameters of one process are counted. B is split like the rows of the weight, and A
        like the columns.
        """
        heads, groups = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        widths = [self.ffn_hidden_size]
        if self.moe:
            widths = [self.moe.ffn_hidden_size] * self.moe.num_experts
            widths += [self.moe.shared_ffn_hidden_size] if self.moe.shared_ffn_hidden_size else []
        by_rows = {"linear_qkv": [(self.hidden_size, heads + 2 * groups)]}
        by_rows["linear_fc1"] = [(self.hidden_size, 2 * width) for width in widths]
        by_columns = {"linear_proj": [(heads, self.hidden_size)]}
        by_columns["linear_fc2"] = [(width, self.hidden_size) for width in widths]
        per_layer = 0
        for target in targets:
            per_layer += sum(rank * (columns + rows // tp) for columns, rows in by_rows.get(target, []))
            per_layer += sum(rank * (columns // tp + rows) for columns, rows in by_columns.get(target, []))
        return per_layer * self.num_layers // pp

    def num_active_parameters(self) -> int:
        """Return the number of parameters that one token uses. Of the routed experts only `topk` per layer count."""
        return self._embedding_parameters() + self._layer_parameters(self.moe.topk if self.moe else 1)

    def flops_per_token(self, seq_length: int, frozen: bool = False) -> float:
        """Return the floating-point operations of forward and backward for one token, for MFU.

        `6 * (active parameters outside the embedding + vocab * hidden + layers * heads * head_dim * seq)`: two
        operations per multiply-add, and a backward pass of twice the forward's. `vocab * hidden` is the output layer,
        which computes even if its weights are tied. The last term is the attention: the scores and their product with
        the values, both halved because the mask is causal (PaLM, appendix B, counts them in full). Activation
        recomputation does not count.

        Args:
            seq_length: tokens of a sequence.
            frozen: only LoRA adapters are trained, so 4 in place of 6 for a weight, which has no gradient of its own.
                The adapters themselves do not count.
        """
        active = self._layer_parameters(self.moe.topk if self.moe else 1)
        attention = self.num_layers * self.num_heads * self.head_dim * seq_length
        return (4.0 if frozen else 6.0) * (active + self.vocab_size * self.hidden_size) + 6.0 * attention

    def _embedding_parameters(self) -> int:
        return self.vocab_size * self.hidden_size * (1 if self.tie_embeddings else 2)

    def _layer_parameters(self, experts: int) -> int:
        """Return the number of parameters outside the embeddings, with `experts` routed experts per layer."""
        h, d = self.hidden_size, self.head_dim
        attention = h * d * (2 * self.num_heads + 2 * self.num_kv_heads)
        norms = 2 * h + (2 * d if self.qk_layernorm else 0)
        if self.moe is None:
            mlp = 3 * h * self.ffn_hidden_size
        else:
            mlp = 3 * h * (experts * self.moe.ffn_hidden_size + self.moe.shared_ffn_hidden_size)
            mlp += h * self.moe.num_experts
        return self.num_layers * (attention + norms + mlp) + h

    # Megatron

    def transformer_config(self, **overrides: Any) -> TransformerConfig:
        """Return the megatron-core config (imports megatron-core). `overrides` replace its fields."""
        from minimind_mcore.models.core_config import transformer_config

        self.require_unpadded()
        return transformer_config(self, **overrides)

    def megatron_flags(self) -> list[str]:
        """Return the Megatron flags of this architecture, in the form of `sys.argv`.

        All of them are flags of MindSpeed-LLM's training programs, except `--router-weight`: with one expert per token
        MindSpeed-LLM's flags do not distinguish `normalized` from `straight_through`. The flags do not include settings
        of a run (layout, precision, batch, `--spec`).

        Raises:
            UserError: the heads are padded.
        """
        self.require_unpadded()
        flags: dict[str, object] = {
            "--num-layers": self.num_layers,
            "--hidden-size": self.hidden_size,
            "--ffn-hidden-size": self.ffn_hidden_size,
            "--num-attention-heads": self.num_heads,
            "--group-query-attention": True,
            "--num-query-groups": self.num_kv_heads,
            "--kv-channels": self.head_dim,
            "--qk-layernorm": self.qk_layernorm,
            "--normalization": "RMSNorm",
            "--norm-epsilon": self.norm_eps,
            "--swiglu": True,
            "--disable-bias-linear": True,
            "--position-embedding-type": "rope",
            "--use-rotary-position-embeddings": True,
            "--rotary-base": self.rope_theta,
            "--max-position-embeddings": self.max_position_embeddings,
            # By default Megatron pads the vocabulary to a multiple of 128 times the TP size.
            "--padded-vocab-size": self.vocab_size,
            "--make-vocab-size-divisible-by": 1,
            "--untie-embeddings-and-output-weights": not self.tie_embeddings,
            # Megatron's defaults are 0.1.
            "--attention-dropout": 0.0,
            "--hidden-dropout": 0.0,
        }
        if self.moe:
            flags |= _moe_flags(self.moe)
        return format_flags(flags)

    @classmethod
    def from_args(cls, args: argparse.Namespace) -> ModelConfig:
        """Return the architecture of parsed Megatron flags. The inverse of `megatron_flags`.

        Raises:
            UserError: a flag is missing, or asks for something that MiniMind's architecture lacks.
        """
        for name, expected, flag in _FIXED_ARGS:
            found = getattr(args, name)
            if found != expected:
                raise UserError(f"{flag}: this flag is needed, because MiniMind has {name}={expected}; found {found}")
        missing = [n for n in ("num_layers", "hidden_size", "num_attention_heads") if getattr(args, n) is None]
        if missing:
            raise UserError(f"missing model flags: {', '.join('--' + n.replace('_', '-') for n in missing)}")
        heads = args.num_attention_heads
        return cls(
            vocab_size=_vocab_size(args),
            hidden_size=args.hidden_size,
            num_layers=args.num_layers,
            num_heads=heads,
            num_kv_heads=args.num_query_groups if args.group_query_attention else heads,
            head_dim=args.kv_channels or args.hidden_size // heads,
            # Megatron's default with --swiglu.
            ffn_hidden_size=args.ffn_hidden_size or args.hidden_size * 8 // 3 // 64 * 64,
            qk_layernorm=args.qk_layernorm,
            norm_eps=args.norm_epsilon,
            rope_theta=int(args.rotary_base),
            max_position_embeddings=args.max_position_embeddings,
            tie_embeddings=not args.untie_embeddings_and_output_weights,
            moe=_moe_from_args(args) if args.num_experts else None,
        )

    # Hugging Face

    def hf_config(self) -> PretrainedConfig:
        """Return the transformers config of the equivalent model (imports transformers)."""
        from minimind_mcore.models.hf_config import to_hf_config

        return to_hf_config(self)

    @classmethod
    def from_hf_config(cls, config: Mapping[str, Any] | str | Path) -> ModelConfig:
        """Read a `config.json`, its directory, or its content: Llama, Qwen2-MoE, Qwen3(-MoE), MiniMind.

        Raises:
            UserError: the file is missing or not JSON, or describes an architecture that is not in this list.
        """
        from minimind_mcore.models.hf_config import load_config, read_fields

        raw, name = load_config(config)
        with naming(name):
            fields = read_fields(raw, name)
            moe = fields.pop("moe")
            return cls(**fields, moe=moe and MoEConfig(**moe))

    def replace(self, **changes: Any) -> ModelConfig:
        """Return a copy with some fields changed."""
        return dataclasses.replace(self, **changes)


def format_flags(flags: Mapping[str, object]) -> list[str]:
    """Return `["--a", "1", "--b", "--d", "2", "3"]` for `{"--a": 1, "--b": True, "--c": False, "--d": (2, 3)}`."""
    argv: list[str] = []
    for flag, value in flags.items():
        if value is True:
            argv.append(flag)
        elif value is not False:
            argv += [flag, *map(str, value if isinstance(value, list | tuple) else [value])]
    return argv


_FIXED_ARGS = (
    ("swiglu", True, "--swiglu"),
    ("add_bias_linear", False, "--disable-bias-linear"),
    ("normalization", "RMSNorm", "--normalization RMSNorm"),
    ("position_embedding_type", "rope", "--position-embedding-type rope"),
)


def _vocab_size(args: argparse.Namespace) -> int:
    if args.padded_vocab_size is None:
        raise UserError("--padded-vocab-size is missing: expected the rows of the embedding, 6400 for MiniMind")
    return int(args.padded_vocab_size)


def _moe_flags(moe: MoEConfig) -> dict[str, object]:
    return {
        "--num-experts": moe.num_experts,
        "--moe-ffn-hidden-size": moe.ffn_hidden_size,
        "--moe-router-topk": moe.topk,
        # Without pre-softmax Megatron computes the softmax over the selected logits, which equals `normalized`.
        # Megatron requires pre-softmax for a single expert per token. There `--norm-topk-prob` normalizes.
        "--moe-router-pre-softmax": moe.topk == 1 or not moe.norm_topk_prob,
        "--norm-topk-prob": moe.norm_topk_prob,
        **({"--router-weight": moe.router_weight} if moe.router_weight and moe.norm_topk_prob else {}),
        "--moe-router-load-balancing-type": moe.load_balancing,
        "--moe-aux-loss-coeff": moe.aux_loss_coeff,
        **({"--moe-shared-expert-intermediate-size": size} if (size := moe.shared_ffn_hidden_size) else {}),
    }


def straight_through_needs_one(topk: int) -> str:
    """Return the error for `straight_through` with several experts per token."""
    return (
        f"router_weight: found straight_through with {topk} experts per token, expected one expert per token; "
        "with several use normalized or softmax (--router-weight)"
    )


def named_router_weight(flags: Mapping[str, Any]) -> RouterWeight | None:
    """Return the router weight that flags, or the arguments of a checkpoint, name; None if they do not name one.

    Megatron's flags distinguish only `softmax` from the other two rules, which have the same forward pass.
    """
    # Checkpoints of other programs and versions lack some of these flags.
    named: RouterWeight | None = flags.get("router_weight")
    if named is not None:
        return named
    if flags.get("spec") == STRAIGHT_THROUGH_SPEC:
        return "straight_through"
    return None if flags.get("norm_topk_prob") or not flags.get("moe_router_pre_softmax") else "softmax"


def default_router_weight(topk: int) -> RouterWeight:
    """Return the router weight for training from random weights (docs/models.md gives the reason)."""
    return "straight_through" if topk == 1 else "normalized"


def router_weight_flags(rule: RouterWeight, topk: int) -> dict[str, object]:
    """Return a router weight as parsed flags, together with Megatron's flags that it implies."""
    return {
        "router_weight": rule,
        "norm_topk_prob": rule != "softmax",
        "moe_router_pre_softmax": rule == "softmax" or topk == 1,
    }


def _moe_from_args(args: argparse.Namespace) -> MoEConfig:
    return MoEConfig(
        num_experts=args.num_experts,
        topk=args.moe_router_topk,
        ffn_hidden_size=args.moe_ffn_hidden_size or args.ffn_hidden_size,
        shared_ffn_hidden_size=args.moe_shared_expert_intermediate_size or 0,
        router_weight=named_router_weight(vars(args)),
        load_balancing=args.moe_router_load_balancing_type,
        aux_loss_coeff=args.moe_aux_loss_coeff,
    )
