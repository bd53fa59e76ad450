"""MindSpeed-RL's own modules by path, on a machine without an NPU: what they import of it is replaced by stand-ins.

MINDSPEED_RL_HOME names a checkout. Only modules whose arithmetic needs none of that are to be called.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
import os
import sys
import types
from pathlib import Path
from typing import Any, ClassVar

import pytest

ABSENT = (
    "torch_npu", "acl", "vllm", "vllm_ascend", "mindspeed", "mindspeed_llm", "megatron", "torchvision", "zmq", "mstx",
    "codetiming", "tensordict",
)  # fmt: skip
# Named by modules whose other functions are of use without it; replaced only where it is not installed.
OPTIONAL = ("latex2sympy2",)
# Their `__init__` imports everything: the packages are made here, and their modules found by path.
PACKAGES = (
    "", ".models", ".models.base", ".models.loss", ".models.rollout", ".models.rollout.vllm_adapter", ".utils",
    ".trainer", ".trainer.utils", ".config_cls", ".datasets", ".workers", ".workers.resharding",
)  # fmt: skip


class StandIn(types.ModuleType):
    """Whatever is asked of it is a class that can be subscripted, called and used as a decorator."""

    __path__: ClassVar[list[str]] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        anything = type(
            name,
            (),
            {
                "__class_getitem__": classmethod(lambda cls, item: cls),
                "__init__": lambda self, *args, **kwargs: None,
                "__call__": lambda self, *args, **kwargs: args[0] if args else self,
            },
        )
        setattr(self, name, anything)
        return anything


class Finder:
    """Finds the stand-ins of what is not installed."""

    def __init__(self, names: set[str]) -> None:
        self.names = names

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name.split(".")[0] in self.names:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)  # type: ignore[arg-type]
        return None

    def create_module(self, spec: Any) -> types.ModuleType:
        return StandIn(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        pass


class Source:
    """A checkout; its modules, and the stand-ins, are forgotten again by `forget`: other tests need the real ones."""

    def __init__(self, home: Path) -> None:
        self.home = home
        missing = [name for name in OPTIONAL if importlib.util.find_spec(name) is None]
        self.replaced = {*ABSENT, *missing}
        self.before = {name: module for name, module in sys.modules.items() if name.split(".")[0] in self.replaced}
        for name in self.before:
            del sys.modules[name]
        self.finder = Finder(self.replaced)
        sys.meta_path.insert(0, self.finder)  # type: ignore[arg-type]
        for suffix in PACKAGES:
            package = types.ModuleType(f"mindspeed_rl{suffix}")
            package.__path__ = [str(home / "mindspeed_rl" / suffix.strip(".").replace(".", "/"))]
            sys.modules[package.__name__] = package

    def module(self, name: str, needs: tuple[str, ...] = ()) -> Any:
        """`mindspeed_rl.<name>`; skips the test where something that it needs is not installed."""
        for needed in needs:
            if needed in self.replaced:
                pytest.skip(f"MindSpeed-RL's {name} needs {needed}, which is not installed")
        try:
            return importlib.import_module(f"mindspeed_rl.{name}")
        except ModuleNotFoundError as error:
            pytest.skip(f"MindSpeed-RL's {name} needs {error.name}, which is not installed")

    def forget(self) -> None:
        sys.meta_path.remove(self.finder)  # type: ignore[arg-type]
        for name in [name for name in sys.modules if name.split(".")[0] in {*self.replaced, "mindspeed_rl"}]:
            del sys.modules[name]
        sys.modules.update(self.before)


def source() -> Source:
    """The checkout that MINDSPEED_RL_HOME names; skips without one."""
    home = os.environ.get("MINDSPEED_RL_HOME")
    if not home:
        pytest.skip("MINDSPEED_RL_HOME is not set: MindSpeed-RL's sources are not here to compare with")
    return Source(Path(home))
