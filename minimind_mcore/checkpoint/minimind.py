"""`.pth` files of MiniMind's trainer, of every generation. The architecture is inferred from names and shapes.

| names                                | generation                              | inferred from          |
|--------------------------------------|-----------------------------------------|------------------------|
| `layers.N.attention.wq`              | v1 (2024-08 to 2025-01)                 | 2 query heads a key head |
|                                      | the first MiniMind2 (2025-02 to 2025-04)| 4 query heads a key head |
| `model.layers.N.self_attn.q_proj`    | MiniMind2                               | no `q_norm`            |
|                                      | minimind-3                              | `q_norm`               |

Settings that shapes do not determine (the number of heads without `q_norm`, eps, rotary base, experts per token) get
the
generation's values, and are listed in `Source.assumptions`. A config.json or flags replace them. Source:
jingyaogong/minimind, model/ and trainer/trainer_utils.py, and their history.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minimind_mcore.checkpoint.assumptions import Assumption
from minimind_mcore.checkpoint.hf import assemble
from minimind_mcore.checkpoint.source import Source
from minimind_mcore.checkpoint.tensors import Shape, TensorFile
from minimind_mcore.checkpoint.torch_zip import Archive, StoredTensor, read_archive
from minimind_mcore.errors import UserError
from minimind_mcore.models.config import ModelConfig, MoEConfig

# Prefixes that torch.compile and DistributedDataParallel add to names
_WRAPPERS = re.compile(r"^(module\.|_orig_mod\.)+")


@dataclass(frozen=True)
class Generation:
    """The settings of a generation that the shapes of its weights do not determine."""

    name: str
    rope_theta: int
    max_position_embeddings: int
    norm_eps: float
    query_heads: int = 8
    topk: int = 2
    load_balancing: str = "seq_aux_loss"
    aux_loss_coeff: float = 0.01


V1 = Generation("v1", 10_000, 512, 1e-5, query_heads=16)
FIRST_MINIMIND2 = Generation("MiniMind2 of before 2025-04-26", 1_000_000, 8192, 1e-5)
MINIMIND2 = Generation("MiniMind2", 1_000_000, 32768, 1e-5)
MINIMIND3 = Generation("minimind-3", 1_000_000, 32768, 1e-6, topk=1, load_balancing="aux_loss", aux_loss_coeff=5e-4)


def is_pth(path: Path) -> bool:
    """Return whether a path is a file, as MiniMind's weights are."""
    return path.is_file()


def open_pth(path: Path, config: ModelConfig | None = None, stated: Mapping[str, object] | None = None) -> Source:
    """Open a weights file, or a resume file, of MiniMind's trainer.

    Args:
        path: the file.
        config: the architecture, instead of the inferred one.
        stated: single values by field, instead of the assumed ones; see `assumptions.FLAGS`.

    Raises:
        UserError: the file is damaged, is not a MiniMind's, or contradicts `config`.
    """
    archive = read_archive(path)
    file = _state_file(archive)
    for name, entry in file.entries.items():
        if not entry.shape or min(entry.shape) < 1:
            raise UserError(f"{path}: {name}: found shape {entry.shape}, expected a vector or a matrix of a MiniMind")
    names = {name: legacy_to_today(_WRAPPERS.sub("", name)) for name in file.entries}
    shapes = {names[name]: entry.shape for name, entry in file.entries.items()}
    generation = generation_of(path, file, shapes)
    sizes = Sizes.of(path, shapes, tied=_is_tied(archive, file, shapes))
    assumed: tuple[Assumption, ...] = ()
    if config is None:
        config, assumed = architecture(path, sizes, generation, stated or {})
    else:
        sizes.require(path, config)
    source = assemble(path, f"MiniMind .pth, {generation.name}", config, [file], lambda name: _WRAPPERS.sub("", name))
    return source.replace(folder=path.parent, assumptions=assumed)


def _state_file(archive: Archive) -> TensorFile:
    content = archive.content
    if isinstance(content, dict) and isinstance(content.get("model"), dict):  # a resume file
        content = content["model"]
    if not isinstance(content, dict) or not any(isinstance(value, StoredTensor) for value in content.values()):
        raise UserError(f"{archive.path}: found no state dict in it; expected the weights of a MiniMind")
    if other := [name for name in content if not isinstance(name, str)]:
        raise UserError(f"{archive.path}: found {other[0]!r} among the names of its tensors; expected texts")
    return archive.tensors(content)


def legacy_to_today(name: str) -> str:
    """Return today's name of a tensor of any generation, for reading shapes. See `weights.legacy_name`."""
    for pattern, replacement in (
        (r"^tok_embeddings\.", "model.embed_tokens."),
        (r"^output\.", "lm_head."),
        (r"^(layers|norm)\.", r"model.\1."),
        (r"\.attention\.w([qkvo])\.", r".self_attn.\1_proj."),
        (r"\.feed_forward\.", ".mlp."),
        (r"\.shared_experts\.(w\d)", r".shared_experts.0.\1"),
        (r"\.w1\.", ".gate_proj."),
    ):
        name = re.sub(pattern, replacement, name)
    return name


def generation_of(path: Path, file: TensorFile, shapes: Mapping[str, Shape]) -> Generation:
    """Return the generation by the module's table.

    Raises:
        UserError: the names fit no generation.
    """
    first = "model.layers.0.self_attn."
    try:
        ratio = shapes[first + "q_proj.weight"][0] / shapes[first + "k_proj.weight"][0]
        if "model.embed_tokens.weight" not in shapes:
            raise KeyError("model.embed_tokens.weight")
    except KeyError as error:
        sample = ", ".join([*file.entries][:3])
        raise UserError(f"{path}: no {error.args[0]} in it (it has {sample}, ...): not a MiniMind's weights") from None
    if any(re.search(r"attention\.wq\.", name) for name in file.entries):
        return V1 if ratio == 2 else FIRST_MINIMIND2
    return MINIMIND3 if first + "q_norm.weight" in shapes else MINIMIND2


@dataclass(frozen=True)
class Sizes:
    """The sizes that the tensors of a file determine.

    Attributes:
        query_rows: num_heads x head_dim.
        key_rows: num_kv_heads x head_dim.
        head_dim: head size. None without a norm of the queries.
        ffn_hidden_size: hidden size of the dense MLP, or of one expert.
        num_experts: number of experts, 0 for a dense model.
        shared_ffn_hidden_size: hidden size of all shared experts together.
        tied: whether the output layer is tied to the embedding. None: both are stored, with equal values.
    """

    vocab_size: int
    hidden_size: int
    num_layers: int
    query_rows: int
    key_rows: int
    head_dim: int | None
    ffn_hidden_size: int
    num_experts: int
    shared_ffn_hidden_size: int
    tied: bool | None

    @classmethod
    def of(cls, path: Path, shapes: Mapping[str, Shape], tied: bool | None) -> Sizes:
        """Read the sizes from the shapes, by today's names.

        Raises:
            UserError: a tensor is missing.
        """
        layers = {int(match[1]) for name in shapes if (match := re.match(r"model\.layers\.(\d+)\.", name))}
        attention, mlp = "model.layers.0.self_attn.", "model.layers.0.mlp."
        router, norm = shapes.get(mlp + "gate.weight"), shapes.get(attention + "q_norm.weight")
        shared = [name for name in shapes if re.match(re.escape(mlp) + r"shared_experts\.\d+\.gate_proj\.weight", name)]
        try:
            width = shapes[mlp + ("experts.0." if router else "") + "gate_proj.weight"][0]
            vocab_size, hidden_size = shapes["model.embed_tokens.weight"]
            q, k = (shapes[f"{attention}{x}_proj.weight"][0] for x in "qk")
        except (KeyError, ValueError) as error:
            raise UserError(f"{path}: no matrix {error.args[0]} in it: not a MiniMind's weights") from None
        return cls(
            vocab_size=vocab_size,
            hidden_size=hidden_size,
            num_layers=len(layers),
            query_rows=q,
            key_rows=k,
            head_dim=norm[0] if norm else None,
            ffn_hidden_size=width,
            num_experts=router[0] if router else 0,
            shared_ffn_hidden_size=width * len(shared),
            tied=tied,
        )

    def require(self, path: Path, config: ModelConfig) -> None:
        """Check the sizes against a given config.

        Raises:
            UserError: they differ. The message names the values.
        """
        moe = config.moe
        given = {
            "vocab_size": config.vocab_size,
            "hidden_size": config.hidden_size,
            "num_layers": config.num_layers,
            "query_rows": config.num_heads * config.head_dim,
            "key_rows": config.num_kv_heads * config.head_dim,
            "head_dim": config.head_dim if config.qk_layernorm else None,
            "ffn_hidden_size": moe.ffn_hidden_size if moe else config.ffn_hidden_size,
            "num_experts": moe.num_experts if moe else 0,
            "shared_ffn_hidden_size": moe.shared_ffn_hidden_size if moe else 0,
            "tied": config.tie_embeddings if self.tied is not None else None,
        }
        what = {
            "query_rows": "num_heads x head_dim",
            "key_rows": "num_kv_heads x head_dim",
            "head_dim": "head_dim of the norms of queries and keys",
            "tied": "tie_embeddings",
        }
        differ = [
            f"{what.get(name, name)} is {found} in the tensors and {given[name]} in the config"
            for name, found in vars(self).items()
            if found != given[name]
        ]
        if differ:
            raise UserError(
                f"{path}: contradicts the given config: {'; '.join(differ)}. Give the config.json of this "
                "model (--hf-cfg-dir) or its model flags"
            )


def architecture(
    path: Path, sizes: Sizes, generation: Generation, stated: Mapping[str, object]
) -> tuple[ModelConfig, tuple[Assumption, ...]]:
    """Return the architecture for the weights of a generation, and the values in it that are assumed.

    Args:
        path: the file, for messages.
        sizes: sizes from the tensors.
        generation: supplies the other values.
        stated: values that replace the generation's. The caller compares the others with the result.

    Raises:
        UserError: the shapes fit no such model.
    """
    norms = sizes.head_dim is not None
    open_values: dict[str, Any] = {} if norms else {"num_heads": generation.query_heads}
    same = {name: getattr(generation, name) for name in ("norm_eps", "rope_theta", "max_position_embeddings")}
    open_values |= same | {"inference_rope_scaling": False}
    if sizes.num_experts:
        open_values |= {
            "topk": generation.topk,
            "norm_topk_prob": True,
            "router_weight": "normalized",
            "load_balancing": generation.load_balancing,
            "aux_loss_coeff": generation.aux_loss_coeff,
        }
    values: dict[str, Any] = open_values | {name: value for name, value in stated.items() if name in open_values}
    if sizes.num_experts and "router_weight" in stated:  # router_weight sets two fields
        del open_values["norm_topk_prob"]
        values["norm_topk_prob"] = values["router_weight"] != "softmax"
    elif sizes.num_experts and not values["norm_topk_prob"]:
        del open_values["router_weight"]
    heads = sizes.query_rows // sizes.head_dim if sizes.head_dim else values["num_heads"]
    head_dim = sizes.head_dim or sizes.query_rows // max(heads, 1)
    if not head_dim or sizes.query_rows != heads * head_dim or sizes.key_rows % head_dim:
        raise UserError(
            f"{path}: {sizes.query_rows} rows of queries and {sizes.key_rows} of keys do not make {heads} query heads "
            f"and key heads of the same size, as {generation.name} has them. Give --num-attention-heads, or the "
            "config.json of the model with --hf-cfg-dir"
        )
    moe = None
    if sizes.num_experts:
        moe = MoEConfig(
            num_experts=sizes.num_experts,
            ffn_hidden_size=sizes.ffn_hidden_size,
            shared_ffn_hidden_size=sizes.shared_ffn_hidden_size,
            router_weight=values["router_weight"] if "router_weight" in stated else None,
            **{name: values[name] for name in ("topk", "norm_topk_prob", "load_balancing", "aux_loss_coeff")},
        )
    config = ModelConfig(
        vocab_size=sizes.vocab_size,
        hidden_size=sizes.hidden_size,
        num_layers=sizes.num_layers,
        num_heads=heads,
        num_kv_heads=sizes.key_rows // head_dim,
        head_dim=head_dim,
        ffn_hidden_size=sizes.ffn_hidden_size,
        qk_layernorm=norms,
        **{name: values[name] for name in (*same, "inference_rope_scaling")},
        tie_embeddings=sizes.tied is not False,
        moe=moe,
    )
    return config, tuple(Assumption(name, value) for name, value in open_values.items() if name not in stated)


def _is_tied(archive: Archive, file: TensorFile, shapes: Mapping[str, Shape]) -> bool | None:
    """Return whether the output layer is tied. None if both tensors are equal, which can also be true of an untied
    model.

    MiniMind's files store both tensors even for tied models.
    """
    if "lm_head.weight" not in shapes:
        return True
    today = {legacy_to_today(_WRAPPERS.sub("", name)): name for name in file.entries}
    embedding, output = today["model.embed_tokens.weight"], today["lm_head.weight"]
    first, second = file.entries[embedding], file.entries[output]
    if first.offset == second.offset:
        return True
    if first.shape != second.shape:
        return False
    probe = TensorFile(archive.path, {embedding: first, output: second})  # separate, so that its reads are not counted
    return None if bool((probe.read(embedding) == probe.read(output)).all()) else False
