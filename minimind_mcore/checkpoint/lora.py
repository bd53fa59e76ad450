"""LoRA adapters in files: read them, merge them into the weights, or convert them to PEFT's format.

The adapter of a weight W (out x in) is A (r x in) and B (out x r). The model computes with W + alpha / r * B A. In a
Megatron checkpoint (MindSpeed-LLM's names) the adapter lies next to the weight:

    linear_qkv.base_layer.weight   linear_qkv.lora_A.default.weight   linear_qkv.lora_B.default.weight

Tensor parallelism splits B as it splits the rows of the weight, or A as it splits the columns. MiniMind's own
`.pth` has `q_proj.lora.A.weight` and `q_proj.lora.B.weight`, with alpha = r (model/model_lora.py).
"""

from __future__ import annotations

import dataclasses
import re
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from minimind_mcore.checkpoint.layout import FilePart, ParallelLayout
from minimind_mcore.checkpoint.source import Lazy, Source
from minimind_mcore.checkpoint.tensors import Entry, TensorFile
from minimind_mcore.checkpoint.torch_zip import read_archive
from minimind_mcore.errors import UserError
from minimind_mcore.models import weights
from minimind_mcore.models.config import ModelConfig
from minimind_mcore.models.rules import QKV, Concat, Rule

_MINIMIND = re.compile(r"^(?:module\.|_orig_mod\.)*(.*)\.lora\.([AB])\.weight$")


@dataclass(frozen=True)
class Adapter:
    """The adapter of one weight of the whole megatron-core model: A [r, in] and B [out, r]."""

    a: Lazy
    b: Lazy

    @property
    def rank(self) -> int:
        """The rank r of the adapter."""
        return self.a.shape[0]


# ------------------------------------------------------------------------------------------- Megatron's names


def without_base_layer(name: str) -> str:
    """Return the name of a weight without the `base_layer` of modules with adapters."""
    return name.removesuffix(".base_layer.weight") + ".weight" if name.endswith(".base_layer.weight") else name


def with_base_layer(name: str) -> str:
    """Return the name of a weight in a module with adapters."""
    return name.removesuffix(".weight") + ".base_layer.weight"


def _adapter_name(weight: str, letter: str) -> str:
    return f"{weight.removesuffix('.weight')}.lora_{letter}.default.weight"


def adapter_parts(
    layout: ParallelLayout, config: ModelConfig, files: Mapping[str, TensorFile]
) -> dict[str, list[FilePart]]:
    """Return the parts of all adapters in a checkpoint, by the name of A or B in the whole model."""
    table: dict[str, list[FilePart]] = {}
    for weight, parts in layout.parts(config).items():
        for letter in "AB":
            own = [dataclasses.replace(part, name=_adapter_name(part.name, letter)) for part in parts]
            if any(f"{part.chunk}/{part.name}" in files[part.folder].entries for part in own):
                table[_adapter_name(weight, letter)] = own
    return table


def whole(name: str, parts: list[FilePart], files: Mapping[str, TensorFile], tp: int) -> Lazy:
    """Assemble A or B of the whole model from its parts.

    Raises:
        UserError: copies of a part differ.
    """
    weight, letter = re.sub(r"\.lora_[AB]\.default", "", name), name[-len("A.default.weight")]
    column_parallel = weight.split(".")[-2] in ("linear_qkv", "linear_fc1")
    is_cut = tp > 1 and letter == ("B" if column_parallel else "A")
    entries = [files[part.folder].entries[f"{part.chunk}/{part.name}"] for part in parts]

    def read() -> Tensor:
        found = shards(name, parts, is_cut, lambda part: files[part.folder].read(f"{part.chunk}/{part.name}"))
        return weights.unshard(weight, found) if is_cut else found[0]

    first = entries[0]
    shape = list(first.shape)
    if is_cut:
        shape[0 if column_parallel else 1] *= tp
    return Lazy(tuple(shape), first.dtype, read)


def shards(name: str, parts: list[FilePart], is_cut: bool, read: Callable[[FilePart], Tensor]) -> list[Tensor]:
    """Read the shards of a tensor, by tensor-parallel rank. One shard if the tensor is not split.

    Raises:
        UserError: copies of a shard differ.
    """
    by_rank: dict[int, list[Tensor]] = defaultdict(list)
    for part in parts:
        by_rank[part.rank if is_cut else 0].append(read(part))
    for copies in by_rank.values():
        if not all(torch.equal(copies[0], copy) for copy in copies[1:]):
            where = ", ".join(f"{part.folder} {part.name}" for part in parts)
            raise UserError(f"{name}: the ranks' copies differ ({where}): the checkpoint is damaged")
    return [by_rank[rank][0] for rank in sorted(by_rank)]


def adapters_of(source: Source) -> dict[str, Adapter]:
    """Return the adapters of a source, by the name of the weight.

    Raises:
        UserError: an adapter has only one of A and B.
    """
    found: dict[str, dict[str, Lazy]] = defaultdict(dict)
    for name, tensor in source.adapters.items():
        weight, letter = re.sub(r"\.lora_[AB]\.default", "", name), name[-len("A.default.weight")]
        found[weight][letter] = tensor
    incomplete = [weight for weight, pair in found.items() if len(pair) != 2]
    if incomplete:
        raise UserError(f"{source.path}: {incomplete[0]} has only one of lora_A and lora_B, expected both")
    return {weight: Adapter(pair["A"], pair["B"]) for weight, pair in found.items()}


def only_adapters(files: Mapping[str, TensorFile]) -> dict[str, TensorFile]:
    """Return the same files with only the adapters in them."""

    def keep(entries: Mapping[str, Entry]) -> dict[str, Entry]:
        return {name: entry for name, entry in entries.items() if ".lora_" in name}

    return {folder: TensorFile(file.path, keep(file.entries)) for folder, file in files.items()}


# ------------------------------------------------------------------------------------------------- MiniMind's


def open_minimind_adapter(path: Path, base: Source) -> tuple[dict[str, Lazy], TensorFile]:
    """Open a LoRA `.pth` of MiniMind as adapters of the whole megatron-core model.

    In megatron-core q, k and v share a weight, and therefore one A: the A of the only one that has an adapter, or all
    A stacked, each with its own columns of B.

    Raises:
        UserError: the file is damaged, or has adapters of another model.
    """
    archive = read_archive(path)
    if not isinstance(archive.content, dict):
        raise UserError(f"{path}: found no adapters in it")
    file = archive.tensors(archive.content)
    pairs: dict[str, dict[str, str]] = defaultdict(dict)
    for name in file.entries:
        match = _MINIMIND.match(name)
        if match is None:
            raise UserError(
                f"{path}: {name}: not a tensor of MiniMind's LoRA (expected names like q_proj.lora.A.weight)"
            )
        pairs[f"{match[1]}.weight"][match[2]] = name
    form = "legacy" if any(".attention.w" in name for name in pairs) else "native"
    rules = {name: rule for rule in weights.rules(base.config, form) for name in rule.hf}
    tensors: dict[str, Lazy] = {}
    for weight in pairs:
        rule = rules.get(weight)
        if rule is None or len(pairs[weight]) != 2 or not rule.mcore:
            raise UserError(f"{path}: {weight} is not a weight of {base.path}, or lacks A or B")
        if _adapter_name(rule.mcore[0], "A") not in tensors:
            tensors |= _combined(path, rule, file, pairs)
    return tensors, file


def _combined(path: Path, rule: Rule, file: TensorFile, pairs: Mapping[str, Mapping[str, str]]) -> dict[str, Lazy]:
    """Combine the adapters of a rule's inputs to A and B of its megatron-core tensor."""
    present = [(i, pairs[name]) for i, name in enumerate(rule.hf) if name in pairs]
    joins_rows = isinstance(rule, QKV) or (isinstance(rule, Concat) and rule.axis == 0)
    if len(rule.hf) > 1 and not joins_rows:
        raise UserError(f"{path}: adapters of {', '.join(rule.hf)} cannot be joined")
    ranks = [file.entries[pair["A"]].shape[0] for _, pair in present]
    for i, pair in present:
        rows, columns = rule.shapes[i]
        for letter, expected in (("A", (ranks[0], columns)), ("B", (rows, ranks[0]))):
            weights.check_shape(pair[letter], file.entries[pair[letter]], expected)

    def read_a() -> Tensor:
        return torch.cat([file.read(pair["A"]) for _, pair in present])

    def read_b() -> Tensor:
        dtype, total = file.entries[present[0][1]["B"]].dtype, sum(ranks)
        blocks = [torch.zeros(shape[0], total, dtype=dtype) for shape in rule.shapes]
        for at, (i, pair) in enumerate(present):
            blocks[i][:, at * ranks[0] : (at + 1) * ranks[0]] = file.read(pair["B"])
        return rule.to_mcore(blocks)[0]

    first = present[0][1]
    rows = sum(shape[0] for shape in rule.shapes)
    return {
        _adapter_name(rule.mcore[0], "A"): Lazy(
            (sum(ranks), rule.shapes[0][1]), file.entries[first["A"]].dtype, read_a
        ),
        _adapter_name(rule.mcore[0], "B"): Lazy((rows, sum(ranks)), file.entries[first["B"]].dtype, read_b),
    }


# ----------------------------------------------------------------------------------------------------- merging


def scale_of(source: Source, rank: int | None, alpha: float | None) -> tuple[int, float]:
    """Return rank and alpha of the adapters: the rank from their shapes, alpha from the checkpoint or the flag.

    Raises:
        UserError: a flag contradicts the checkpoint, or alpha is in neither.
    """
    found = min(adapter.rank for adapter in adapters_of(source).values())  # combined adapters of MiniMind have more
    if rank not in (None, found):
        raise UserError(f"--lora-r {rank}: the adapters have rank {found}")
    known = source.training.lora_alpha
    if alpha is not None and known is not None and alpha != known:
        raise UserError(f"--lora-alpha {alpha:g}: the checkpoint was trained with {known:g}")
    alpha = known if alpha is None else alpha
    if alpha is None:
        raise UserError("the adapters' alpha is not in the checkpoint: give --lora-alpha, as in training")
    return found, alpha


def require_modules(source: Source, modules: tuple[str, ...]) -> Source:
    """Check that the adapters belong to `--lora-target-modules`, if given.

    Raises:
        UserError: they belong to other modules.
    """
    if not modules:
        return source
    kept = {n: t for n, t in source.adapters.items() if any(f".{module}." in n for module in modules)}
    missing = [module for module in modules if not any(f".{module}." in name for name in kept)]
    if missing or len(kept) < len(source.adapters):
        found = sorted({name.split(".lora_")[0].rsplit(".", 1)[-1] for name in source.adapters})
        raise UserError(
            f"--lora-target-modules {' '.join(modules)}: the adapters belong to {' '.join(found)}; name these, or none"
        )
    return source


def merge(source: Source, rank: int | None, alpha: float | None) -> Source:
    """Return the source with the adapters added to the weights in fp32.

    Raises:
        UserError: see `scale_of`; or an adapter does not fit its weight.
    """
    rank, alpha = scale_of(source, rank, alpha)
    merged = {}
    for name, adapter in adapters_of(source).items():
        tensor = source.tensors[name]
        if (adapter.b.shape[0], adapter.a.shape[1]) != tensor.shape:
            raise UserError(f"{name}: B {adapter.b.shape} x A {adapter.a.shape} does not fit {tensor.shape}")
        merged[name] = Lazy(tensor.shape, tensor.dtype, _sum(tensor, adapter, alpha / rank))
    return source.replace(tensors={**source.tensors, **merged}, adapters={}, as_stored=False)


def _sum(tensor: Lazy, adapter: Adapter, scale: float) -> Callable[[], Tensor]:
    def read() -> Tensor:
        product = adapter.b.read().float() @ adapter.a.read().float()
        return (tensor.read().float() + scale * product).to(tensor.dtype)

    return read
