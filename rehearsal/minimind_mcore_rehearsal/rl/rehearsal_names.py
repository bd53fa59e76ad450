"""Stubs and patches with which MindSpeed-RL runs on a host without NPUs.

* Modules of `vllm` and `vllm_ascend` that this folder does not contain are replaced by stubs, whose classes do nothing.
  So are optional packages that are not installed.
* Megatron-LM 0.12.1 writes `torch_dist` checkpoints with a private function of torch. From torch 2.9 on this function
  has one more argument, which a patch fills in. An Ascend host has torch 2.7.1.

If REHEARSAL_ROLLOUTS is set, the batches that MindSpeed-RL's actor trains on are saved.
"""

from __future__ import annotations

import functools
import importlib.abc
import importlib.machinery
import importlib.util
import inspect
import itertools
import os
import sys
import types
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

OPTIONAL = ("torchvision", "qwen_vl_utils", "av", "mathruler", "latex2sympy2", "word2number")


class _Names(types.ModuleType):
    """A module each of whose names is a class that can be subclassed, subscripted and called."""

    __path__: ClassVar[list[str]] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        made = type(name, (), {
            "__module__": self.__name__,
            "__class_getitem__": classmethod(lambda cls, item: cls),
            "__init__": lambda self, *args, **kwargs: None,
            "__call__": lambda self, *args, **kwargs: args[0] if args else self,
        })  # fmt: skip
        setattr(self, name, made)
        return made


class _NamesFinder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Creates a stub for every module of some packages. It must be the last finder, so that real modules come first."""

    def __init__(self, packages: set[str]) -> None:
        self.packages = packages

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name.split(".")[0] in self.packages:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return _Names(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        pass


class _Behind(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Calls a function with a module after the module is imported."""

    def __init__(self, name: str, function: Callable[[Any], None]) -> None:
        self.name, self.function, self.busy = name, function, False
        self.inner: Any = None

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != self.name or self.busy:
            return None
        self.busy = True
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self.busy = False
        if spec is not None:
            self.inner, spec.loader = spec.loader, self
        return spec

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType | None:
        created: types.ModuleType | None = self.inner.create_module(spec)
        return created

    def exec_module(self, module: types.ModuleType) -> None:
        self.inner.exec_module(module)
        self.function(module)


def _write_as_torch_saves(module: Any) -> None:
    """Fill in the argument that torch 2.9 added to `_write_item` with the format of earlier versions."""
    from torch.distributed.checkpoint import filesystem

    write = module._write_item
    if "serialization_format" in inspect.signature(write).parameters:
        form = filesystem.SerializationFormat.TORCH_SAVE
        module._write_item = functools.partial(write, serialization_format=form)


def _record_updates(module: Any) -> None:
    """Save the batch of every update at the path REHEARSAL_ROLLOUTS, to compare it with another trainer."""
    engine = module.BaseTrainingEngine
    update, numbers = engine.update, itertools.count(1)

    @functools.wraps(update)
    def recorded(self: Any, data: Any, *args: Any, **kwargs: Any) -> Any:
        metrics = update(self, data, *args, **kwargs)
        if (path := os.environ.get("REHEARSAL_ROLLOUTS")) and self.role == "actor":
            import torch

            where = f"{path}.{os.environ.get('RANK', '0')}.update-{next(numbers)}.pt"
            torch.save({"batch": dict(data), "metrics": dict(metrics)}, where)
        return metrics

    engine.update = recorded


def install() -> None:
    """Register the finders. MindSpeed-RL, torch and Megatron are not imported here."""
    missing = {name for name in OPTIONAL if importlib.util.find_spec(name) is None}
    sys.meta_path.append(_NamesFinder({"vllm", "vllm_ascend"} | missing))
    strategies = "megatron.core.dist_checkpointing.strategies"
    sys.meta_path.insert(0, _Behind(f"{strategies}.filesystem_async", _write_as_torch_saves))
    sys.meta_path.insert(0, _Behind("mindspeed_rl.models.base.base_training_engine", _record_updates))
