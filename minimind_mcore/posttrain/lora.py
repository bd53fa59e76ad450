"""LoRA with peft on Megatron's parallel linear layers. The base is frozen, and checkpoints hold only the adapters.

    linear_qkv.base_layer.weight [out, in]     linear_qkv.lora_A.default.weight [r, in]     ...lora_B... [out, r]

The names are MindSpeed-LLM's. Tensor parallelism splits B where it splits the rows of the weight, and A where it splits
the columns. The other of the two matrices is replicated.

    --pretrained-checkpoint BASE --load ADAPTERS     a run that the same command can resume
    --load BASE [--lora-load ADAPTERS]               the flags of MindSpeed-LLM

Adapters fit only the base weights that they were trained on. Their checkpoints therefore store `base_digest`, and a
resumed run compares it with its own base.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from minimind_mcore.errors import UserError
from minimind_mcore.models import weights
from minimind_mcore.models.init import initial_tensor
from minimind_mcore.platform import ranks
from minimind_mcore.training import checkpointing
from minimind_mcore.training.config import TrainConfig

if TYPE_CHECKING:
    from megatron.core.models.gpt import GPTModel


def begin(config: TrainConfig, chunks: list[GPTModel]) -> None:
    """Read the base of `pretrained_checkpoint` into this rank's GPTModels, and give them adapters. Collective."""
    checkpointing.load_weights(config, Path(str(config.checkpoint.pretrained_checkpoint)), chunks)
    config.record.lora_base = base_digest(chunks)
    adapt(config, chunks)


def adapt(config: TrainConfig, chunks: list[GPTModel]) -> None:
    """Freeze this rank's GPTModels and add adapters to the target layers, with the same values in every layout."""
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
            # Activation recomputation computes gradients only if its input requires one; the embedding is frozen.
            chunk.embedding.register_forward_hook(lambda module, inputs, output: output.requires_grad_())
    _initialize(config, chunks)


@torch.no_grad()
def _initialize(config: TrainConfig, chunks: list[GPTModel]) -> None:
    """Initialize A as torch initializes a linear layer, from `--seed` and the name. B is zero."""
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
    """Return a digest of the weights of all ranks, independent of layout and, down to bf16, of precision. Collective.

    Args:
        chunks: this rank's GPTModels, without adapters.
    """
    from minimind_mcore.models.loading import tensor_parallel_rank, whole_model_parameters

    mine = {
        (name, tensor_parallel_rank(name)[0] if weights.is_split(name) else 0): content_sum(parameter.detach())
        for name, parameter in whole_model_parameters(chunks)
    }
    return digest_of({part: value for parts in ranks.gather(mine) for part, value in parts.items()})


def digest_of(parts: Mapping[tuple[str, int], int]) -> str:
    """Return the SHA-256 of the `content_sum` of each shard, keyed by (name, tensor-parallel rank)."""
    sums: dict[str, int] = {}
    for (name, _), value in parts.items():
        sums[name] = (sums.get(name, 0) + value) % 2**64
    return hashlib.sha256(json.dumps(sums, sort_keys=True).encode()).hexdigest()


def content_sum(tensor: Tensor) -> int:
    """Hash the elements in any order. The sums of the shards of a tensor add up modulo 2**64, however it is split."""
    patterns = tensor.cpu().bfloat16().contiguous().view(torch.int16).flatten().long() & 0xFFFF
    counts = torch.bincount(patterns, minlength=2**16).numpy().astype(np.uint64)
    return int((counts * _hashes()).sum(dtype=np.uint64))


@functools.cache
def _hashes() -> NDArray[np.uint64]:
    """Return a hash for each 16-bit pattern: splitmix64 (Steele, Lea and Flood, 2014)."""
    x = (np.arange(2**16, dtype=np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    hashes: NDArray[np.uint64] = x ^ (x >> np.uint64(31))
    return hashes


def check(config: TrainConfig) -> TrainConfig:
    """Refuse unsupported LoRA settings, and return the configuration with separate paths of base and adapters.

    The base is then in `pretrained_checkpoint`, and the adapters are in `load`.

    Raises:
        UserError: a setting is not supported.
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
