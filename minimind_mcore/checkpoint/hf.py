"""Hugging Face directories (Llama, Qwen3, Qwen3-MoE, Qwen2-MoE), and MiniMind in the same format.

The weights are one file, or several files with an index, in safetensors or `torch.save` format. The names are those of
`models/weights.py`. Experts are separate tensors, or stacked in one tensor as in transformers 5.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from minimind_mcore.checkpoint.source import Lazy, Source, Training
from minimind_mcore.checkpoint.tensors import Shape, Slot, TensorFile, open_safetensors
from minimind_mcore.checkpoint.torch_zip import read_archive
from minimind_mcore.errors import UserError
from minimind_mcore.inputs.documents import read_object
from minimind_mcore.models import weights
from minimind_mcore.models.config import ModelConfig
from minimind_mcore.models.rules import Rule, StackExperts
from minimind_mcore.preprocess.tokenize import tokenizer_fingerprint

WEIGHTS = ("model.safetensors", "pytorch_model.bin")


@dataclass(frozen=True)
class Stored(Slot):
    """A tensor in a file."""

    file: TensorFile
    name: str

    def read(self, block: int = 0, blocks: int = 1) -> Tensor:
        return self.file.read(self.name, block, blocks)


def is_hf(path: Path) -> bool:
    """Return whether a path is a Hugging Face directory, or looks like an incomplete one."""
    return (path / "config.json").is_file()


def open_hf(path: Path, given: ModelConfig | None = None) -> Source:
    """Open a Hugging Face directory.

    Args:
        path: the directory.
        given: another config, which must describe the same model.

    Raises:
        UserError: a file is missing or damaged, the tensors do not match the config, or the configs contradict each
            other.
    """
    config = ModelConfig.from_hf_config(path)
    if given is not None:
        require_same(config, given, f"{path / 'config.json'}")
    files = [open_tensors(file) for file in weight_files(path)]
    raw = read_object(path / "config.json")
    kind = f"Hugging Face {raw['model_type']}, {path.name}"
    source = assemble(path, kind, config, files).replace(folder=path)
    if not (path / "tokenizer.json").is_file():
        return source
    return source.replace(training=Training(tokenizer=str(path.absolute()), fingerprint=tokenizer_fingerprint(path)))


def require_same(config: ModelConfig, given: ModelConfig, where: str) -> None:
    """Check that two configs describe the same model.

    The rows of the embedding may differ, because an output can be padded or cut. The balancing of experts may differ,
    because it does not change the model's function, and no config of transformers states it.

    Raises:
        UserError: the configs differ. The message names the values.
    """

    def fields(model: ModelConfig) -> dict[str, object]:
        found: dict[str, object] = dict(vars(model))
        found |= vars(model.moe) if model.moe else {"num_experts": 0}
        ignored = ("vocab_size", "moe", "load_balancing", "aux_loss_coeff")
        return {name: value for name, value in found.items() if name not in ignored}

    here, there = fields(config), fields(given)
    differ = [name for name in {**here, **there} if here.get(name) != there.get(name)]
    if differ:
        values = "; ".join(f"{name} is {here.get(name)} there and {there.get(name)} in --hf-cfg-dir" for name in differ)
        raise UserError(
            f"{where}: contradicts the config.json of --hf-cfg-dir: {values}. Give the config.json of this model"
        )


def weight_files(path: Path) -> list[Path]:
    """Return the files with the tensors.

    Raises:
        UserError: there are none, or a file of the index is missing.
    """
    for name in WEIGHTS:
        index = path / f"{name}.index.json"
        if index.is_file():
            return [path / name for name in _indexed_files(index)]
        if (path / name).is_file():
            return [path / name]
    raise UserError(f"{path}: found a config.json and no weights; expected one of {', '.join(WEIGHTS)}, or an index")


def _indexed_files(index: Path) -> list[str]:
    """Return the file names of an index.

    Raises:
        UserError: the index is damaged, or names a file that is missing or outside its directory.
    """
    try:
        names = sorted(set(read_object(index)["weight_map"].values()))
        outside = [name for name in names if Path(name).is_absolute() or ".." in Path(name).parts]
        missing = [name for name in names if not (index.parent / name).is_file()] if not outside else []
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise UserError(f'{index}: is damaged ({error}); expected {{"weight_map": {{tensor: file}}}}') from error
    if outside:
        raise UserError(
            f"{index}: names {outside[0]}, expected files in {index.parent}: an index may not point anywhere else"
        )
    if missing:
        raise UserError(f"{index.parent}: {index.name} names {', '.join(missing)}, which is missing; get it again")
    return names


def open_tensors(path: Path) -> TensorFile:
    """Open a safetensors or `torch.save` file."""
    if path.suffix == ".safetensors":
        return open_safetensors(path)
    archive = read_archive(path)
    if not isinstance(archive.content, dict):
        raise UserError(f"{path}: found no state dict in it")
    return archive.tensors(archive.content)


def assemble(
    path: Path, kind: str, config: ModelConfig, files: list[TensorFile], names: Callable[[str], str] = lambda name: name
) -> Source:
    """Build the whole megatron-core model from a state dict of transformers or MiniMind.

    Args:
        path: path of the model.
        kind: see `Source`.
        config: the architecture.
        files: the files with all tensors.
        names: maps a name in a file to a name of `models/weights.py`.

    Raises:
        UserError: a tensor is missing, unknown, in two files, or has a wrong shape.
    """
    stored: dict[str, Stored] = {}
    for file in files:
        for name, entry in file.entries.items():
            if names(name) in stored:
                raise UserError(f"{file.path}: {name} is in {stored[names(name)].file.path.name} too; expected one")
            stored[names(name)] = Stored(entry.shape, entry.dtype, file, name)
    table = weights.rules(config, weights.detect_form(stored))
    if config.tie_embeddings and table[0].hf[0] not in stored and table[1].hf[0] in stored:
        stored[table[0].hf[0]] = stored.pop(table[1].hf[0])  # safetensors stores only one of two tied tensors
    weights.account(stored, {n for r in table if r.required for n in r.hf}, {n for r in table for n in r.hf})
    tensors: dict[str, Lazy] = {}
    checks: list[Callable[[], object]] = []
    for rule in table:
        if any(name not in stored for name in rule.hf):  # an optional tensor
            continue
        for name, shape in zip(rule.hf, rule.shapes, strict=True):
            weights.check_shape(name, stored[name], shape)
        inputs = [stored[name] for name in rule.hf]
        if not rule.mcore:
            checks.append(functools.partial(_apply, rule, inputs))
            continue
        for name, lazy in zip(rule.mcore, _outputs(rule, inputs), strict=True):
            tensors[name] = _same(tensors[name], lazy, rule.hf) if name in tensors else lazy
    tensors = {name: tensors[name] for name in weights.mcore_shapes(config)}
    return Source(path=path, kind=kind, config=config, tensors=tensors, files=tuple(files), checks=tuple(checks))


def _outputs(rule: Rule, inputs: list[Stored]) -> list[Lazy]:
    """Return the megatron-core tensors of a rule."""
    if len({tensor.dtype for tensor in inputs}) > 1:
        found = ", ".join(f"{tensor.name} {tensor.dtype}" for tensor in inputs)
        raise UserError(f"expected one dtype, found {found}; give --params-dtype after making them equal")
    dtype = inputs[0].dtype
    shape = rule.mcore_shapes[0]
    if isinstance(rule, StackExperts):  # the only rule with several outputs
        stacked, blocks = inputs[0], len(rule.mcore)
        return [Lazy(shape, dtype, functools.partial(_block, stacked, e, blocks, shape)) for e in range(blocks)]
    return [Lazy(shape, dtype, lambda: _apply(rule, inputs)[0])]


def _block(stacked: Stored, block: int, blocks: int, shape: Shape) -> Tensor:
    return stacked.read(block, blocks).view(shape)


def _apply(rule: Rule, inputs: list[Stored]) -> list[Tensor]:
    return rule.to_mcore([tensor.read() for tensor in inputs])


def _same(first: Lazy, second: Lazy, names: tuple[str, ...]) -> Lazy:
    """Return one of two tied tensors, and check that both are equal when it is read."""

    def read() -> Tensor:
        tensor = first.read()
        if not torch.equal(tensor, second.read()):
            raise UserError(f"{', '.join(names)}: differs from the tensor it is tied to, by the config")
        return tensor

    return Lazy(first.shape, first.dtype, read)
