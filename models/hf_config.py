"""Convert transformers configs and MiniMind's own `config.json` to and from `ModelConfig`.

| `ModelConfig`                         | transformers          | MiniMind's own (`model_type: minimind`) |
|---------------------------------------|-----------------------|------------------------------------------|
| no qk-norm (MiniMind2)                | Llama                 | keys `n_routed_experts`, `seq_aux`, ...  |
| no qk-norm, experts and shared expert | Qwen2-MoE             | the same, `use_moe: true`                |
| qk-norm (minimind-3)                  | Qwen3                 | keys `num_experts`, `head_dim`, ...      |
| qk-norm, experts                      | Qwen3-MoE             | the same, `use_moe: true`                |

Qwen2-MoE gates its shared expert and adds biases to q, k, v. A gate logit of zero halves the expert's output, so
`down_proj` of the expert is stored doubled. The biases are stored as zeros (`weights.py`). MiniMind writes the keys of
its mixture of experts for dense models too, so only `use_moe` tells whether the model has experts.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minimind_mcore.errors import UserError
from minimind_mcore.inputs.documents import read_object
from minimind_mcore.inputs.ranges import HF_NAMES, RANGES, problem
from minimind_mcore.models import yarn

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from minimind_mcore.models.config import ModelConfig, MoEConfig

_MODEL_TYPES = ("llama", "qwen3", "qwen2_moe", "qwen3_moe")
_BOOLS = ("tie_word_embeddings", "use_moe", "norm_topk_prob", "seq_aux", "inference_rope_scaling")
# As in the table of ranges, but floats with an integer value are accepted, because transformers writes them.
_ROPE_THETA = dataclasses.replace(RANGES["rotary_base"], kind=float)


def hf_model_type(config: ModelConfig) -> str:
    """Return the transformers `model_type` of the equivalent model: a key of the table above.

    Raises:
        UserError: transformers has no equivalent model.
    """
    if config.moe is None:
        return "qwen3" if config.qk_layernorm else "llama"
    if config.qk_layernorm != bool(config.moe.shared_ffn_hidden_size):
        return "qwen3_moe" if config.qk_layernorm else "qwen2_moe"
    have = "both" if config.qk_layernorm else "neither"
    raise UserError(
        f"a mixture of experts with {have} of qk-norm and a shared expert has no transformers model: "
        "expected qk-norm alone (Qwen3-MoE) or a shared expert alone (Qwen2-MoE)"
    )


def to_hf_config(config: ModelConfig) -> PretrainedConfig:
    """Return the transformers configuration of a model."""
    import transformers

    model_type = hf_model_type(config)
    fields = _common_fields(config)
    # transformers 5 stores the value in `rope_parameters`, but accepts it here as 4 does.
    fields["rope_theta"] = config.rotary_base
    if config.unpadded_head_dim:
        fields["unpadded_head_dim"] = config.unpadded_head_dim
    if config.inference_rope_scaling:
        if not yarn.transformers_agrees(config.head_dim, config.rotary_base):
            raise UserError(
                f"inference_rope_scaling with head_dim {config.head_dim} and rope_theta {config.rope_theta}: here the "
                "YaRN of transformers differs from MiniMind's. Keep MiniMind's own form (--format minimind)"
            )
        fields["rope_scaling"] = dict(yarn.PARAMETERS)
    if config.moe:
        fields |= {
            "num_experts": config.moe.num_experts,
            "num_experts_per_tok": config.moe.topk,
            "norm_topk_prob": config.moe.norm_topk_prob,
            **_router_weight(config.moe),
            "moe_intermediate_size": config.moe.ffn_hidden_size,
            "router_aux_loss_coef": config.moe.aux_loss_coeff,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
        }
    if model_type == "qwen2_moe":
        assert config.moe is not None
        # Versions before about 4.50 cannot switch off the biases. Zeros work in every version.
        fields |= {"shared_expert_intermediate_size": config.moe.shared_ffn_hidden_size, "qkv_bias": True}
    return transformers.AutoConfig.for_model(model_type, **fields)


def to_native_config(config: ModelConfig) -> dict[str, Any]:
    """Return the content of MiniMind's own `config.json`.

    Raises:
        UserError: MiniMind's code does not support this mixture of experts or padded heads.
    """
    config.require_unpadded()
    if config.inference_rope_scaling and config.max_position_embeddings <= yarn.TRAINED_LENGTH:
        raise UserError(
            f"inference_rope_scaling with max_position_embeddings {config.max_position_embeddings}: MiniMind's class "
            f"scales only above {yarn.TRAINED_LENGTH}. Raise max_position_embeddings in the model's config.json"
        )
    fields = _common_fields(config) | {
        "model_type": "minimind",
        "architectures": ["MiniMindForCausalLM"],
        "rope_theta": float(config.rope_theta),
        "use_moe": config.moe is not None,
        "dropout": 0.0,
        "flash_attn": True,
        "inference_rope_scaling": config.inference_rope_scaling,
    }
    moe = config.moe
    experts: dict[str, Any]
    if config.qk_layernorm:
        if moe and (moe.shared_ffn_hidden_size or moe.load_balancing == "seq_aux_loss"):
            raise UserError("minimind-3 has neither shared experts nor a sequence-level auxiliary loss")
        experts = {
            "num_experts": moe.num_experts if moe else 4,
            "num_experts_per_tok": moe.topk if moe else 1,
            "moe_intermediate_size": moe.ffn_hidden_size if moe else config.ffn_hidden_size,
            "norm_topk_prob": moe.norm_topk_prob if moe else True,
            **_router_weight(moe),
            "router_aux_loss_coef": moe.aux_loss_coeff / moe.topk if moe else 5e-4,
        }
    else:
        width = config.ffn_hidden_size
        if moe and (moe.ffn_hidden_size != width or moe.shared_ffn_hidden_size % width):
            raise UserError(f"every expert of a MiniMind2 is as wide as its MLP, {width}; found {moe}")
        experts = {
            "n_routed_experts": moe.num_experts if moe else 4,
            "n_shared_experts": moe.shared_ffn_hidden_size // width if moe else 1,
            "num_experts_per_tok": moe.topk if moe else 2,
            "norm_topk_prob": moe.norm_topk_prob if moe else True,
            **_router_weight(moe),
            "scoring_func": "softmax",
            "aux_loss_alpha": moe.aux_loss_coeff if moe else 0.01,
            "seq_aux": moe.load_balancing == "seq_aux_loss" if moe else True,
        }
    return fields | experts


def _router_weight(moe: MoEConfig | None) -> dict[str, str]:
    """Return this kit's key for the router weight, if known. transformers and vLLM use `norm_topk_prob` and keep the
    key."""
    return {"router_weight": moe.router_weight} if moe and moe.router_weight else {}


def _common_fields(config: ModelConfig) -> dict[str, Any]:
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.ffn_hidden_size,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "max_position_embeddings": config.max_position_embeddings,
        "tie_word_embeddings": config.tie_embeddings,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


def read_fields(raw: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return the fields of `ModelConfig` that a config sets. "moe" is None, or the fields of `MoEConfig`.

    Args:
        raw: content of the config.
        name: name of the config, for messages.

    Raises:
        UserError: the config does not describe a MiniMind.
    """
    reader = _Reader(raw, name)
    model_type = raw.get("model_type")
    if model_type == "minimind":
        return _read_native(reader)
    if not isinstance(model_type, str) or model_type not in _MODEL_TYPES:
        known = ", ".join([*_MODEL_TYPES, "minimind"])
        raise UserError(f"{name}: model_type: found {model_type!r}, expected one of {known}")
    reader.expect("attention_bias", False)
    reader.expect("mlp_bias", False)
    reader.expect("use_sliding_window", False)
    moe = None
    if model_type.endswith("_moe"):
        moe = _read_moe(reader, model_type)
    return _read_common(reader, qk_layernorm=model_type.startswith("qwen3"), tied_default=False, moe=moe)


class _Reader:
    """The keys of a config. Errors name the file, the key, the value found and the value expected."""

    def __init__(self, raw: Mapping[str, Any], name: str) -> None:
        self.raw, self.name = raw, name
        for key, field in HF_NAMES.items():
            if raw.get(key) is not None and not (key == "n_shared_experts" and "n_layers" in raw):  # a bool there
                self._require(key, problem(field, raw[key]))
        for key in _BOOLS:
            if raw.get(key) is not None and not isinstance(raw[key], bool):
                self._require(key, f"found {raw[key]!r}, expected true or false")
        for key in ("rope_scaling", "rope_parameters"):
            if raw.get(key) is not None and not isinstance(raw[key], Mapping):
                self._require(key, f"found {raw[key]!r}, expected an object")

    def _require(self, key: str, wrong: str | None) -> None:
        if wrong:
            raise UserError(f"{self.name}: {key}: {wrong}")

    def get(self, *keys: str) -> Any:
        """Return the value of the first of these keys that exists."""
        for key in keys:
            if self.raw.get(key) is not None:
                return self.raw[key]
        raise UserError(f"{self.name}: {keys[0]} is missing")

    def expect(self, key: str, expected: object) -> None:
        """Check that a key is absent or has this value."""
        found = self.raw.get(key)
        if found is not None and found != expected:
            raise UserError(f"{self.name}: {key}: found {found!r}, expected {expected!r}; MiniMind has nothing else")

    @property
    def rope_parameters(self) -> dict[str, Any]:
        """Return the parameters of the rotary embedding, from the form of transformers 4 or 5."""
        return {**(self.raw.get("rope_scaling") or {}), **(self.raw.get("rope_parameters") or {})}

    def inference_rope_scaling(self) -> bool:
        """Return whether the config enables MiniMind's YaRN."""
        parameters, native = self.rope_parameters, self.raw.get("model_type") == "minimind"
        asked = bool(self.raw.get("inference_rope_scaling"))
        kind = parameters.get("rope_type", parameters.get("type", "default"))
        if kind != "default" and not yarn.is_ours({"attention_factor": 1.0} | parameters if native else parameters):
            raise UserError(
                f"{self.name}: rope scaling: found {kind!r} ({parameters}), expected none, or MiniMind's YaRN: "
                f"{yarn.PARAMETERS}. Weights of MiniMind are trained without rope scaling"
            )
        if native and kind != "default" and not asked:
            raise UserError(
                f"{self.name}: rope_scaling is {kind!r} and inference_rope_scaling is false: MiniMind's class would "
                "not scale. Remove rope_scaling, or set inference_rope_scaling to true"
            )
        if native:  # MiniMind's class scales only if there are more positions than in training
            return asked and bool(self.get("max_position_embeddings") > yarn.TRAINED_LENGTH)
        return asked or kind != "default"

    def rope_theta(self) -> int:
        """Return the base of the rotary embedding."""
        parameters = self.rope_parameters
        if parameters.get("partial_rotary_factor") not in (None, 1.0):
            raise UserError(f"{self.name}: partial_rotary_factor: expected 1.0")
        theta = parameters.get("rope_theta")
        theta = self.get("rope_theta") if theta is None else theta
        if unpadded := self.raw.get("unpadded_head_dim"):
            return self._unpadded_theta(theta, unpadded / self.get("head_dim"))
        self._require("rope_theta", _ROPE_THETA.problem(theta))
        if theta != int(theta):
            raise UserError(f"{self.name}: rope_theta: found {theta}, expected an integer (Megatron needs one)")
        return int(theta)

    def _unpadded_theta(self, theta: object, share: float) -> int:
        """Return the base of the rotary embedding before padding. `share` is the unpadded share of a head."""
        number = theta if isinstance(theta, int | float) and theta > 1 else math.nan
        unpadded = math.pow(number, share)
        self._require("rope_theta", _ROPE_THETA.problem(unpadded))
        if not math.isclose(math.pow(round(unpadded), 1 / share), number, rel_tol=1e-9):
            self._require("rope_theta", f"found {theta}, which is not the base of heads padded by --pad-head-dim")
        return round(unpadded)


def _read_common(
    reader: _Reader, *, qk_layernorm: bool, tied_default: bool, moe: dict[str, Any] | None
) -> dict[str, Any]:
    reader.expect("hidden_act", "silu")
    raw, get = reader.raw, reader.get
    heads, hidden = get("num_attention_heads"), get("hidden_size")
    return dict(
        vocab_size=get("vocab_size"),
        hidden_size=hidden,
        num_layers=get("num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=raw.get("num_key_value_heads") or heads,
        head_dim=raw.get("head_dim") or hidden // heads,
        ffn_hidden_size=get("intermediate_size"),
        qk_layernorm=qk_layernorm,
        norm_eps=get("rms_norm_eps"),
        inference_rope_scaling=reader.inference_rope_scaling(),
        rope_theta=reader.rope_theta(),
        max_position_embeddings=get("max_position_embeddings"),
        unpadded_head_dim=raw.get("unpadded_head_dim"),
        tie_embeddings=raw.get("tie_word_embeddings", tied_default),
        moe=moe,
    )


def _read_moe(reader: _Reader, model_type: str) -> dict[str, Any]:
    reader.expect("decoder_sparse_step", 1)
    reader.expect("mlp_only_layers", [])
    shared = model_type == "qwen2_moe"
    return dict(
        _routing(reader),
        num_experts=reader.get("num_experts", "num_local_experts"),
        ffn_hidden_size=reader.get("moe_intermediate_size"),
        shared_ffn_hidden_size=reader.get("shared_expert_intermediate_size") if shared else 0,
        # Not in the config: the loss with which MiniMind trains this architecture.
        load_balancing="seq_aux_loss" if shared else "aux_loss",
        aux_loss_coeff=reader.get("router_aux_loss_coef"),
    )


def _routing(reader: _Reader) -> dict[str, Any]:
    return dict(
        topk=reader.get("num_experts_per_tok"),
        norm_topk_prob=reader.get("norm_topk_prob"),
        router_weight=reader.raw.get("router_weight"),
    )


def _read_native(reader: _Reader) -> dict[str, Any]:
    if "n_layers" in reader.raw:
        reader = _Reader(_legacy_as_native(reader), reader.name)
    reader.expect("dropout", 0.0)
    reader.expect("scoring_func", "softmax")
    second = "n_routed_experts" in reader.raw  # minimind-3 has num_experts instead, also in dense models
    raw = dict(reader.raw)
    if raw.get("intermediate_size") is None:
        ratio = 8 / 3 if second else math.pi
        raw["intermediate_size"] = math.ceil(reader.get("hidden_size") * ratio / 64) * 64
    reader = _Reader(raw, reader.name)
    moe = None
    if raw.get("use_moe"):
        moe = _read_moe2(reader) if second else _read_moe3(reader)
    return _read_common(reader, qk_layernorm=not second, tied_default=True, moe=moe)


def _legacy_as_native(reader: _Reader) -> dict[str, Any]:
    """Return the config of v1 and the first MiniMind2 (before 2025-04-26) with the names of MiniMind2.

    Their weights rotate neighbouring rows of a head (`weights.py`, form `legacy`). The model is the same.
    """
    raw, get = dict(reader.raw), reader.get
    width, unit = raw.get("hidden_dim"), raw.get("multiple_of") or 64
    raw |= {
        "hidden_size": get("dim"),
        "num_hidden_layers": get("n_layers"),
        "num_attention_heads": get("n_heads"),
        "num_key_value_heads": raw.get("n_kv_heads") or get("n_heads"),
        "intermediate_size": width or math.ceil(int(8 * get("dim") / 3) / unit) * unit,
        "rms_norm_eps": get("norm_eps"),
        "max_position_embeddings": get("max_seq_len"),
        "rope_theta": raw.get("rope_theta") or 1e4,  # v1 has no such key
        "n_shared_experts": int(bool(raw.get("n_shared_experts"))),
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "n_routed_experts": raw.get("n_routed_experts", 4),
    }
    return raw


def _read_moe2(reader: _Reader) -> dict[str, Any]:
    width = reader.get("intermediate_size")
    return dict(
        _routing(reader),
        num_experts=reader.get("n_routed_experts"),
        ffn_hidden_size=width,
        shared_ffn_hidden_size=width * reader.get("n_shared_experts"),
        load_balancing="seq_aux_loss" if reader.get("seq_aux") else "aux_loss",
        aux_loss_coeff=reader.get("aux_loss_alpha"),
    )


def _read_moe3(reader: _Reader) -> dict[str, Any]:
    return dict(
        _routing(reader),
        num_experts=reader.get("num_experts"),
        ffn_hidden_size=reader.get("moe_intermediate_size"),
        load_balancing="aux_loss",
        aux_loss_coeff=reader.get("router_aux_loss_coef") * reader.get("num_experts_per_tok"),
    )


def load_config(source: Mapping[str, Any] | str | Path) -> tuple[Mapping[str, Any], str]:
    """Return the content of a config, its file or its directory, and its name for messages."""
    if isinstance(source, Mapping):
        return source, "config"
    path = Path(source)
    path = path / "config.json" if path.is_dir() else path
    return read_object(path, "give the config.json of a Hugging Face model"), str(path)
