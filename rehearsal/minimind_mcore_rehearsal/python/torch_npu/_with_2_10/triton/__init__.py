"""Names of Triton-Ascend, whose kernels MindSpeed core_r0.16.0 defines when it is imported. They cannot run."""

from __future__ import annotations

from typing import Any

from . import language, runtime

__version__ = "3.2.0"


class Config:
    def __init__(self, *_args: Any, **_kwargs: Any) -> None: ...


class _Kernel:
    def __init__(self, function: Any) -> None:
        self.fn = function

    def __getitem__(self, _grid: Any) -> Any:
        raise NotImplementedError(f"the Triton kernel {getattr(self.fn, '__name__', self.fn)} is not emulated")


def jit(function: Any = None, **_options: Any) -> Any:
    return _Kernel(function) if function is not None else _Kernel


def autotune(*_args: Any, **_kwargs: Any) -> Any:
    return lambda kernel: kernel


heuristics = autotune


def next_power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()


def cdiv(a: int, b: int) -> int:
    return -(-a // b)
