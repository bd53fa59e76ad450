"""`.pth` files of MiniMind's trainer, of every generation: the architecture is told from names and shapes.

| names                                | generation                              | told how               |
|--------------------------------------|-----------------------------------------|------------------------|
| `layers.N.attention.wq`              | v1 (2024-08 to 2025-01)                 | 2 query heads a key head |
|                                      | the first MiniMind2 (2025-02 to 2025-04)| 4 query heads a key head |
| `model.layers.N.self_attn.q_proj`    | MiniMind2                               | no `q_norm`            |
|                                      | minimind-3                              | `q_norm`               |

What shapes do not tell (the number of heads without `q_norm`, eps, rotary base) is the generation's; another
config.json can be given. Source: jingyaogong/minimind, model/ and trainer/trainer_utils.py, and their history.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minimind_mcore.converters.files import Shape, TensorFile
from minimind_mcore.converters.hf import assemble
from minimind_mcore.converters.source import Source
from minimind_mcore.converters.torch_zip import Archive, StoredTensor, read_archive
from minimind_mcore.errors import UserError
from minimind_mcore.models.config import ModelConfig, MoEConfig

# what torch.compile and DistributedDataParallel put before names
_WRAPPERS = re.compile(r"^(module\.|_orig_mod\.)+")


@dataclass(frozen=True)
class Generation:
    """What the shapes of a generation's weights do not tell."""

    name: str
    rope_theta: int
    max_position_embeddings: int
    norm_eps: float
    query_heads: int = 8


V1 = Generation("v1", 10_000, 512, 1e-5, query_heads=16)
FIRST_MINIMIND2 = Generation("MiniMind2 of before 2025-04-26", 1_000_000, 8192, 1e-5)
MINIMIND2 = Generation("MiniMind2", 1_000_000, 32768, 1e-5)
MINIMIND3 = Generation("minimind-3", 1_000_000, 32768, 1e-6)


def is_pth(path: Path) -> bool:
    """Whether it is a file, as MiniMind's weights are."""
    return path.is_file()


def open_pth(path: Path, config: ModelConfig | None = None) -> Source:
    """Open a file of weights, or one of those that MiniMind resumes from.

    Args:
        path: the file.
        config: the architecture, in place of what names and shapes tell.

    Raises:
        UserError: damaged, or not a MiniMind's weights.
    """
    archive = read_archive(path)
    file = _state_file(archive)
    names = {name: legacy_to_today(_WRAPPERS.sub("", name)) for name in file.entries}
    shapes = {names[name]: entry.shape for name, entry in file.entries.items()}
    generation = generation_of(path, file, shapes)
    found = config or architecture(path, shapes, generation, tied=_is_tied(archive, file, shapes))
    source = assemble(path, f"MiniMind .pth, {generation.name}", found, [file], lambda name: _WRAPPERS.sub("", name))
    return source.replace(folder=path.parent)


def _state_file(archive: Archive) -> TensorFile:
    content = archive.content
    if isinstance(content, dict) and isinstance(content.get("model"), dict):  # a resume file
        content = content["model"]
    if not isinstance(content, dict) or not any(isinstance(value, StoredTensor) for value in content.values()):
        raise UserError(f"{archive.path}: found no state dict in it; expected the weights of a MiniMind")
    return archive.tensors(content)


def legacy_to_today(name: str) -> str:
    """Today's name of a tensor, whatever the generation, for reading shapes; see `weights.legacy_name`."""
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
    """The generation, by the table above.

    Raises:
        UserError: none of them.
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


def architecture(path: Path, shapes: Mapping[str, Shape], generation: Generation, tied: bool) -> ModelConfig:
    """The architecture of weights of a generation.

    Args:
        path: for messages.
        shapes: by today's names.
        generation: for what shapes do not tell.
        tied: whether the output layer is the embedding.

    Raises:
        UserError: the shapes fit no such model.
    """
    layers = {int(match[1]) for name in shapes if (match := re.match(r"model\.layers\.(\d+)\.", name))}
    attention, mlp = "model.layers.0.self_attn.", "model.layers.0.mlp."
    vocab_size, hidden_size = shapes["model.embed_tokens.weight"]
    q, k = (shapes[f"{attention}{x}_proj.weight"][0] for x in "qk")
    head_dim = shapes.get(attention + "q_norm.weight", (q // generation.query_heads,))[0]
    if q % head_dim or k % head_dim:
        raise UserError(
            f"{path}: {q} rows of queries and {k} of keys are not heads of {head_dim}, as {generation.name} has "
            "them; give its config.json with --hf-cfg-dir"
        )
    moe = None
    if router := shapes.get(mlp + "gate.weight"):
        moe = _experts(shapes, mlp, router[0], generation)
    return ModelConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        num_layers=len(layers),
        num_heads=q // head_dim,
        num_kv_heads=k // head_dim,
        head_dim=head_dim,
        ffn_hidden_size=shapes[mlp + ("experts.0." if moe else "") + "gate_proj.weight"][0],
        qk_layernorm=generation is MINIMIND3,
        norm_eps=generation.norm_eps,
        rope_theta=generation.rope_theta,
        max_position_embeddings=generation.max_position_embeddings,
        tie_embeddings=tied,
        moe=moe,
    )


def _experts(shapes: Mapping[str, Shape], mlp: str, count: int, generation: Generation) -> MoEConfig:
    width = shapes[mlp + "experts.0.gate_proj.weight"][0]
    shared = [name for name in shapes if re.match(re.escape(mlp) + r"shared_experts\.\d+\.gate_proj\.weight", name)]
    settings: dict[str, Any] = {"topk": 2, "load_balancing": "seq_aux_loss", "aux_loss_coeff": 0.01}
    if generation is MINIMIND3:
        settings = {"topk": 1, "load_balancing": "aux_loss", "aux_loss_coeff": 5e-4}
    return MoEConfig(num_experts=count, ffn_hidden_size=width, shared_ffn_hidden_size=width * len(shared), **settings)


def _is_tied(archive: Archive, file: TensorFile, shapes: Mapping[str, Shape]) -> bool:
    """Whether the output layer has the values of the embedding: MiniMind's files hold both."""
    if "lm_head.weight" not in shapes:
        return True
    today = {legacy_to_today(_WRAPPERS.sub("", name)): name for name in file.entries}
    embedding, output = today["model.embed_tokens.weight"], today["lm_head.weight"]
    first, second = file.entries[embedding], file.entries[output]
    if first.offset == second.offset:
        return True
    probe = TensorFile(archive.path, {embedding: first, output: second})  # does not count as reading
    return bool((probe.read(embedding) == probe.read(output)).all()) if first.shape == second.shape else False
