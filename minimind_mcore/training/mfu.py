"""Model FLOPs utilization: model FLOPs per second divided by the device's measured matrix multiplication rate.

    rate = matmul_rate(torch.bfloat16)                      # FLOP/s, measured on this device
    mfu(config, seq_length=2048, tokens_per_second=5e5, matmul_rate=rate)

The rate is measured, not taken from a data sheet: no matrix product reaches the rates of data sheets, and the clock of
a device depends on its power limit.
"""

from __future__ import annotations

import time

import torch

from minimind_mcore.models.config import ModelConfig
from minimind_mcore.platform import device

LARGEST = 8192  # rows of the largest matrices; an H100 multiplies two in 1.4 ms
ENOUGH_SECONDS = 1e-3  # a product of this duration hides the time of the kernel launch


def mfu(
    config: ModelConfig, seq_length: int, tokens_per_second: float, matmul_rate: float, frozen: bool = False
) -> float:
    """Return the model FLOPs utilization of one device.

    Args:
        config: the architecture.
        seq_length: tokens of a sequence. Attention counts as causal.
        tokens_per_second: tokens per second of this device.
        matmul_rate: result of `matmul_rate` in the same run, in FLOP/s.
        frozen: only LoRA adapters are trained.
    """
    return config.flops_per_token(seq_length, frozen) * tokens_per_second / matmul_rate


def matmul_rate(dtype: torch.dtype, largest: int = LARGEST, repeats: int = 10) -> float:
    """Measure the rate of matrix products on this process's device, in FLOP/s.

    The matrices are square. They are random, because zeros would need less power and a GPU would run at a higher
    clock. Their size doubles from 512 until one product takes `ENOUGH_SECONDS` or the size is `largest`. The result is
    the median of three measurements with `repeats` products each.
    """
    place, size = device.current().torch_device, min(512, largest)
    # A generator of its own: drawing from the device's generator would change the dropout of a resumed run.
    numbers = torch.Generator(place).manual_seed(0)
    while True:
        left, right = (torch.randn(size, size, device=place, dtype=dtype, generator=numbers) for _ in range(2))
        out = torch.empty_like(left)
        seconds = _seconds(left, right, out, 3)
        if seconds >= ENOUGH_SECONDS or 2 * size > largest:
            break
        size *= 2
    rates = sorted(2.0 * size**3 / _seconds(left, right, out, repeats) for _ in range(3))
    return rates[1]


def _seconds(left: torch.Tensor, right: torch.Tensor, out: torch.Tensor, repeats: int) -> float:
    """Return the mean seconds of one product, after one warm-up product."""
    torch.mm(left, right, out=out)
    device.synchronize()
    started = time.perf_counter()
    for _ in range(repeats):
        torch.mm(left, right, out=out)
    device.synchronize()
    return (time.perf_counter() - started) / repeats
