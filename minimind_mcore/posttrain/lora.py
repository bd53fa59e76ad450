"""LoRA through peft on Megatron's parallel linear layers: the base is frozen, checkpoints hold the adapters alone.

    linear_qkv.base_layer.weight [out, in]     linear_qkv.lora_A.default.weight [r, in]     ...lora_B... [out, r]

The names are those of MindSpeed-LLM. Tensor parallelism cuts B where it cuts the rows of the weight, A where it
cuts the columns; the other of the two is the same on every rank.

    --pretrained-checkpoint BASE --load ADAPTERS     a run that can be resumed by the same command
    --load BASE [--lora-load ADAPTERS]               as MindSpeed-LLM has it

Adapters fit the weights that they were trained on and no others: their checkpoints carry `base_digest`, which a run
that goes on compares with its own.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from minimind_mcore.errors import UserError
from minimind_mcore.models import weights
from minimind_mcore.models.init import initial_tensor
from minimind_mcore.platform import ranks
from minimind_mcore.training.config import TrainConfig

if TYPE_CHECKING:
    from megatron.core.models.gpt import GPTModel


def adapt(config: TrainConfig, chunks: list[GPTModel]) -> None:
    """Freeze this rank's GPTModels and give their target layers adapters, the same whatever the layout."""
    from megatron.core import tensor_parallel
    from peft import LoraConfig, inject_adapter_in_model

    from minimind_mcore.posttrain.lora_layer import ParallelLora

    lora = LoraConfig(
        r=config.model.lora_r,
        lora_alpha=config.model.lora_alpha,
        target_modules=config.model.lora_target_modules,
        init_lora_weights=False,
    )
    parallel = (tensor_parallel.ColumnParallelLinear, tensor_parallel.RowParallelLinear)
    lora._register_custom_module({kind: ParallelLora for kind in parallel})
    for chunk in chunks:
        inject_adapter_in_model(lora, chunk)
        if config.model.recompute_granularity == "full" and chunk.pre_process:
            # What is computed again gets gradients only if its input does; that of the first layer is frozen.
            chunk.embedding.register_forward_hook(lambda module, inputs, output: output.requires_grad_())
    _initialize(config, chunks)


@torch.no_grad()
def _initialize(config: TrainConfig, chunks: list[GPTModel]) -> None:
    """A as torch initialises a linear layer, from `--seed` and its name; B is zero."""
    from megatron.core import parallel_state

    from minimind_mcore.models.loading import whole_model_parameters

    model = config.architecture
    rank, size = parallel_state.get_tensor_model_parallel_rank(), parallel_state.get_tensor_model_parallel_world_size()
    for name, parameter in whole_model_parameters(chunks):
        if ".lora_A." in name:
            is_cut = getattr(parameter, "tensor_model_parallel", False)
            shape = (parameter.shape[0], parameter.shape[1] * (size if is_cut else 1))
            whole = initial_tensor(name, shape, model, scheme="torch", seed=config.data.seed)
            parameter.copy_(whole.chunk(size, dim=1)[rank] if is_cut else whole)
        elif ".lora_B." in name:
            parameter.zero_()


def base_digest(chunks: list[GPTModel]) -> str:
    """Identity of the weights of all ranks, whatever the layout, and the precision down to bf16. Collective.

    Args:
        chunks: this rank's GPTModels, without adapters.
    """
    from minimind_mcore.models.loading import tensor_parallel_place, whole_model_parameters

    mine = {
        (name, tensor_parallel_place(name)[0] if weights.is_split(name) else 0): content_sum(parameter.detach())
        for name, parameter in whole_model_parameters(chunks)
    }
    return digest_of({part: value for parts in ranks.gather(mine) for part, value in parts.items()})


def digest_of(parts: Mapping[tuple[str, int], int]) -> str:
    """SHA-256 of the `content_sum` of each part of each tensor, (name, tensor-parallel rank)."""
    sums: dict[str, int] = {}
    for (name, _), value in parts.items():
        sums[name] = (sums.get(name, 0) + value) % 2**64
    return hashlib.sha256(json.dumps(sums, sort_keys=True).encode()).hexdigest()


def content_sum(tensor: Tensor) -> int:
    """A hash of the elements in any order, which adds up modulo 2**64 over the parts of a tensor, however it is cut."""
    patterns = tensor.cpu().bfloat16().contiguous().view(torch.int16).flatten().long() & 0xFFFF
    counts = torch.bincount(patterns, minlength=2**16).numpy().astype(np.uint64)
    return int((counts * _hashes()).sum(dtype=np.uint64))


@functools.cache
def _hashes() -> NDArray[np.uint64]:
    """A number for each pattern of 16 bits: splitmix64 (Steele, Lea and Flood, 2014)."""
    x = (np.arange(2**16, dtype=np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    hashes: NDArray[np.uint64] = x ^ (x >> np.uint64(31))
    return hashes


def check(config: TrainConfig) -> TrainConfig:
    """Refuse what LoRA cannot do; return the configuration with base and adapters told apart.

    The base is then in `pretrained_checkpoint`, the adapters are in `load`.

    Raises:
        UserError: see there.
    """
    if importlib.util.find_spec("peft") is None:
        raise UserError("--lora-target-modules needs the package peft, which is not installed: pip install peft")
    known = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")
    files, targets = config.checkpoint, config.model.lora_target_modules
    if unknown := [name for name in targets if name not in known]:
        raise UserError(f"--lora-target-modules {unknown[0]}: expected some of {', '.join(known)}")
    cut = config.layout.tp * config.layout.ep > 1
    if config.model.num_experts and cut and {"linear_fc1", "linear_fc2"} & set(targets):
        raise UserError(
            "--lora-target-modules linear_fc1, linear_fc2: adapters of experts need TP=1 and EP=1; leave them out, or "
            "change the layout"
        )
    if files.ckpt_format != "torch":
        raise UserError(f"--ckpt-format {files.ckpt_format}: adapters are saved with --ckpt-format torch")
    adapters = files.lora_load or (files.load if files.pretrained_checkpoint else None)
    if not (base := files.pretrained_checkpoint or files.load):
        raise UserError("--pretrained-checkpoint is missing (or --load): the model to adapt")
    return config.changed(pretrained_checkpoint=base, load=adapters)
