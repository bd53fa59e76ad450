"""Load only weights, into any layout: of Hugging Face or MiniMind, or a `torch` checkpoint that is resharded."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from torch import Tensor

from minimind_mcore.checkpoint.files import content, saved_args
from minimind_mcore.checkpoint.layout import ParallelLayout
from minimind_mcore.checkpoint.minimind import is_pth
from minimind_mcore.checkpoint.opening import open_source
from minimind_mcore.checkpoint.source import Source, require_finite
from minimind_mcore.errors import UserError
from minimind_mcore.models.config import ModelConfig, named_router_weight
from minimind_mcore.training.checkpoint_fit import check_router, check_tokenizer
from minimind_mcore.training.checkpoint_torch import load_schedule
from minimind_mcore.training.config import TrainConfig
from minimind_mcore.training.step import Engine


def is_model(path: Path) -> bool:
    """Return whether a path holds weights of Hugging Face or MiniMind, and is not a directory of checkpoints."""
    return path.is_file() or (path / "config.json").is_file()


def saved_layout(directory: Path) -> ParallelLayout:
    """Return the layout of a `torch` checkpoint."""
    return ParallelLayout.from_args(saved_args(directory))


def read_model(config: TrainConfig, path: Path, engine: Engine) -> Source:
    """Load this rank's chunks from model files. The optimizer starts with zero moments.

    Raises:
        UserError: the files hold another model, or are damaged.
    """
    from minimind_mcore.models.loading import load_into  # imports megatron

    source = open_model(config, path)
    load_into(engine.model, lambda name: read_tensor(source, name))
    engine.take_weights()
    return source


def open_model(config: TrainConfig, path: Path) -> Source:
    """Open files that must hold the run's model. No weight is read yet.

    Raises:
        UserError: the files hold another model, or `open_weights` refuses them.
    """
    own = config.architecture
    source = open_weights(config, path, own if is_pth(path) else None)  # which does not say all of it
    for field in dataclasses.fields(ModelConfig):
        found, expected = getattr(source.config, field.name), getattr(own, field.name)
        # The maximum context does not change the weights, the balancing of experts belongs to training, and MiniMind
        # scales the rotary embedding for inference only.
        if field.name not in ("max_position_embeddings", "inference_rope_scaling", "moe") and found != expected:
            raise UserError(f"--load {path}: {field.name} is {found} there and {expected} on the command line")
    if moe := source.config.moe:
        rule = named_router_weight(config.flags) if is_pth(path) else moe.router_weight  # a .pth leaves it open
        check_router(config.flags, moe.topk, rule, f"--load {path}")
    return source


def open_weights(config: TrainConfig, path: Path, architecture: ModelConfig | None = None) -> Source:
    """Open a model of any size that was trained with the run's tokenizer.

    Raises:
        UserError: the model has another tokenizer or unmerged adapters, or the files are damaged.
    """
    source = open_source(path, architecture)
    check_tokenizer(config.record.tokenizer_fingerprint, source.training.fingerprint, path)
    if source.adapters:
        raise UserError(f"{path}: holds LoRA adapters: merge them into their base first (convert_ckpt_v2.py)")
    for check in source.checks:
        check()
    return source


def read_tensor(source: Source, name: str) -> Tensor:
    """Read one tensor of the whole megatron-core model. A value that is not finite is a `UserError`."""
    tensor = source.tensors[name].read()
    require_finite(name, tensor)
    return tensor


def reshard(config: TrainConfig, directory: Path, engine: Engine) -> dict[str, Any]:
    """Load this rank's chunks from a `torch` checkpoint of another layout. Return the saved dictionary."""
    read_model(config, directory, engine)
    saved: dict[str, Any] = content(directory)
    if not (config.checkpoint.finetune or config.checkpoint.no_load_optim) and "opt_param_scheduler" in saved:
        load_schedule(engine.scheduler, saved["opt_param_scheduler"], directory)
    return saved
