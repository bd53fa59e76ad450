"""Megatron checkpoints of format `torch` in any parallel layout, from this kit, MindSpeed-LLM or its converters.

checkpoint/latest_checkpointed_iteration.txt
           iter_0000100/mp_rank_TT[_PPP][_EEE]/model_optim_rng.pt     args, model (or model0, model1, ...)
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minimind_mcore.checkpoint import lora
from minimind_mcore.checkpoint.files import NAME, args_in
from minimind_mcore.checkpoint.layout import FilePart, ParallelLayout
from minimind_mcore.checkpoint.source import Lazy, Source, Training
from minimind_mcore.checkpoint.tensors import TensorFile
from minimind_mcore.checkpoint.torch_zip import Archive, StoredTensor, read_archive
from minimind_mcore.errors import UserError
from minimind_mcore.models import weights
from minimind_mcore.models.config import ModelConfig, MoEConfig, named_router_weight

Shapes = Mapping[str, tuple[int, ...]]
# Settings that shapes do not determine. MindSpeed-LLM's converter uses other names for some or leaves them out.
_SETTINGS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("num_heads", ("num_attention_heads",)),
    ("num_kv_heads", ("num_query_groups", "num_attention_heads")),
    ("norm_eps", ("norm_epsilon", "layernorm_epsilon")),
    ("rope_theta", ("rotary_base",)),
    ("max_position_embeddings", ("max_position_embeddings",)),
)


def model_config(
    directory: Path, args: argparse.Namespace, layout: ParallelLayout, shapes: Shapes, given: ModelConfig | None
) -> ModelConfig:
    """Return the architecture of a checkpoint.

    Args:
        directory: the checkpoint, for messages.
        args: arguments in the checkpoint.
        layout: layout of the checkpoint.
        shapes: shapes of the tensors in its files, by name.
        given: the architecture, for values that the arguments lack.

    Raises:
        UserError: a value is neither in the arguments nor given, or the two contradict each other.
    """
    rows = _size(directory, shapes, weights.EMBEDDING, 0) * layout.tp
    if given is not None:
        _compare(directory, args, layout, given)
        return given.replace(vocab_size=rows)
    values: dict[str, Any] = {name: _first(directory, args, names) for name, names in _SETTINGS}
    hidden = _size(directory, shapes, weights.EMBEDDING, 1)
    experts = _shape(shapes, "mlp.router.weight")
    dense = _shape(shapes, ".mlp.linear_fc1.weight")
    ffn = dense[0] * layout.tp // 2 if dense else None
    width = getattr(args, "moe_ffn_hidden_size", None) or getattr(args, "moe_intermediate_size", None)
    # Grouped experts have one shape for all of them, and their number is known.
    expert = _shape(shapes, ".local_experts.0.linear_fc1.weight")
    width = expert[0] * layout.tp // 2 if expert else width
    return ModelConfig(
        **values | {"rope_theta": int(values["rope_theta"])},
        vocab_size=rows,
        hidden_size=hidden,
        num_layers=args.num_layers - len(layout.noop_layers),
        head_dim=getattr(args, "kv_channels", None) or hidden // values["num_heads"],
        ffn_hidden_size=ffn or getattr(args, "ffn_hidden_size", None) or width or 0,
        qk_layernorm=_shape(shapes, "q_layernorm.weight") is not None,
        inference_rope_scaling=bool(getattr(args, "inference_rope_scaling", False)),
        tie_embeddings=not getattr(args, "untie_embeddings_and_output_weights", False),
        moe=_experts(directory, args, layout, shapes, experts[0], width) if experts else None,
    )


def _experts(
    directory: Path, args: argparse.Namespace, layout: ParallelLayout, shapes: Shapes, count: int, width: int | None
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
        shared_ffn_hidden_size=shared[0] * layout.tp // 2 if shared else 0,
        router_weight=named_router_weight(vars(args)),
        load_balancing=balancing if isinstance(balancing, str) else "aux_loss",
        aux_loss_coeff=getattr(args, "moe_aux_loss_coeff", 0.0),
    )


def _compare(directory: Path, args: argparse.Namespace, layout: ParallelLayout, given: ModelConfig) -> None:
    """Check a given config against the checkpoint's arguments. Shapes are compared later, tensor by tensor."""
    expected: dict[str, Any] = {names[0]: getattr(given, name) for name, names in _SETTINGS[:4]}
    expected |= {"num_layers": layout.megatron_layers(given), "kv_channels": given.head_dim}
    expected["untie_embeddings_and_output_weights"] = not given.tie_embeddings
    expected["inference_rope_scaling"] = given.inference_rope_scaling  # only converters store this value
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
        raise UserError(f"{directory}: found no {ending}: not a checkpoint of a language model")
    return shape[axis]


Files = Mapping[str, TensorFile]  # by folder; a tensor of chunk "model" is "model/NAME" there


def open_megatron(directory: Path, config: ModelConfig | None = None) -> Source:
    """Open the checkpoint of one iteration.

    Args:
        directory: directory with `mp_rank_*`.
        config: the architecture, for values that the checkpoint's arguments lack.

    Raises:
        UserError: a file is missing or damaged, or the tensors do not match the model.
    """
    first, args, layout, files = _open(directory)
    found = {lora.without_base_layer(n): e.shape for file in files.values() for n, e in file.entries.items()}
    model = model_config(directory, args, layout, found, config)
    layout.check(model)
    parts = layout.parts(model)
    adapters = lora.adapter_parts(layout, model, files)
    _account(directory, parts, adapters, files)
    shapes = weights.mcore_shapes(model)
    return Source(
        path=directory,
        kind=f"Megatron torch, {layout}",
        config=model,
        tensors={name: _whole(name, shapes[name], parts[name], files, layout.tp) for name in shapes},
        files=tuple(files.values()),
        layout=layout,
        training=training_of(args, first.content),
        adapters={name: lora.whole(name, found, files, layout.tp) for name, found in adapters.items()},
    )


def open_adapters(directory: Path, base: Source) -> Source:
    """Return the base with the adapters of another checkpoint, saved in any layout.

    Raises:
        UserError: the checkpoint is damaged, has no adapters, or has adapters of another model.
    """
    first, args, layout, opened = _open(directory)
    files = lora.only_adapters(opened)
    adapters = lora.adapter_parts(layout, base.config, files)
    if not adapters:
        raise UserError(f"{directory}: found no LoRA adapters there; expected linear_*.lora_A.default.weight")
    _account(directory, {}, adapters, files)
    return base.replace(
        adapters={name: lora.whole(name, found, files, layout.tp) for name, found in adapters.items()},
        files=(*base.files, *files.values()),
        training=base.training.replace(lora_alpha=training_of(args, first.content).lora_alpha),
    )


def _open(directory: Path) -> tuple[Archive, argparse.Namespace, ParallelLayout, dict[str, TensorFile]]:
    """Return the file of the first rank, its arguments, its layout, and the tensors of every rank by folder."""
    first = read_archive(sorted(directory.glob("mp_rank_*"))[0] / NAME)
    args, model = args_in(first), first.content.get("model")
    if isinstance(model, dict) and "language_model" in model:
        raise UserError(
            f"{first.path}: a Megatron-legacy checkpoint (language_model): only mcore checkpoints are supported; "
            "convert it with the tools of its source"
        )
    layout = ParallelLayout.from_args(args)
    folders = _folders(directory, layout)
    return first, args, layout, {folder: _tensors(read_archive(directory / folder / NAME)) for folder in folders}


def _folders(directory: Path, layout: ParallelLayout) -> list[str]:
    """Return the folders of all ranks, and check that the directory has exactly these."""
    expected = layout.folders()
    found = {p.name for p in directory.glob("mp_rank_*")}
    missing = [name for name in expected if not (directory / name / NAME).is_file()]
    if missing:
        raise UserError(f"{directory}: missing {', '.join(f'{m}/{NAME}' for m in missing)}; it was saved with {layout}")
    if extra := sorted(found - set(expected)):
        raise UserError(f"{directory}: {', '.join(extra)} does not belong to a checkpoint saved with {layout}")
    return expected


def _tensors(archive: Archive) -> TensorFile:
    state: dict[str, StoredTensor] = {}
    for key, chunk in archive.content.items():
        if key.removeprefix("model").isdigit() or key == "model":
            # Transformer Engine's extra state is not needed
            state |= {f"{key}/{name}": value for name, value in chunk.items() if not name.endswith("_extra_state")}
    return archive.tensors(state)


def _account(
    directory: Path, parts: Mapping[str, list[FilePart]], adapters: Mapping[str, list[FilePart]], files: Files
) -> None:
    """Check that the files hold exactly the parts of the model's tensors."""
    expected: dict[str, set[str]] = defaultdict(set)
    for part in (part for table in (parts, adapters) for found in table.values() for part in found):
        expected[part.folder].add(f"{part.chunk}/{part.name}")
    for folder, file in files.items():
        # In modules with adapters the weight is one level deeper.
        renamed = {lora.without_base_layer(name) for name in file.entries}
        problems = []
        for kind, names in (("missing", expected[folder] - renamed), ("unknown", renamed - expected[folder])):
            if names:
                problems.append(f"{len(names)} {kind} tensors: {', '.join(sorted(names)[:4])}")
        if problems:
            raise UserError(f"{directory / folder / NAME}: does not fit the model: {'; '.join(problems)}")


def _whole(name: str, shape: tuple[int, ...], parts: list[FilePart], files: Files, tp: int) -> Lazy:
    """Assemble a tensor of the whole model from its parts."""
    dtypes = {files[part.folder].entries[_stored_name(files, part)].dtype for part in parts}
    if len(dtypes) > 1:
        raise UserError(f"{name}: its parts have dtypes {', '.join(map(str, dtypes))}, expected one")

    def read_one(part: FilePart) -> Tensor:
        tensor = read_part(files, part, part.shape(name, shape, tp))
        return tensor.t() if part.grouped else tensor

    def read() -> Tensor:
        return weights.unshard(name, lora.shards(name, parts, weights.is_split(name), read_one))

    return Lazy(shape, dtypes.pop(), read)


def read_part(files: Files, part: FilePart, expected: tuple[int, ...]) -> Tensor:
    """Read a part in the form that its file stores.

    Raises:
        UserError: the part has another shape.
    """
    file, name = files[part.folder], _stored_name(files, part)
    found = file.entries[name].shape
    if (found if part.blocks == 1 else (torch.Size(found).numel(),)) != (
        expected if part.blocks == 1 else (torch.Size(expected).numel() * part.blocks,)
    ):
        raise UserError(f"{file.path}: {name}: found shape {found}, expected {expected}, in {part.blocks} blocks")
    return file.read(name, part.block, part.blocks).view(expected)


def _stored_name(files: Files, part: FilePart) -> str:
    name = f"{part.chunk}/{part.name}"
    return name if name in files[part.folder].entries else lora.with_base_layer(name)


def training_of(args: argparse.Namespace, content: Mapping[str, Any]) -> Training:
    """Return the training facts in the arguments and the contents of a checkpoint."""

    def text(name: str) -> str | None:
        value = getattr(args, name, None)
        return value if isinstance(value, str) else None

    # Every command line has an alpha. It was used only if modules are named.
    alpha = getattr(args, "lora_alpha", None) if getattr(args, "lora_target_modules", None) else None
    return Training(
        iteration=content["iteration"] if isinstance(content.get("iteration"), int) else 1,
        consumed_samples=getattr(args, "consumed_train_samples", 0) or 0,
        tokenizer=text("tokenizer_name_or_path") or text("tokenizer_model"),
        fingerprint=text("tokenizer_fingerprint"),
        lora_alpha=float(alpha) if isinstance(alpha, int | float) else None,
    )
