"""Model FLOPs utilisation: the share of a device's measured matrix rate that a training run turns into model FLOPs.

    rate = matmul_rate(torch.bfloat16)                      # FLOP/s, measured here and now
    mfu(config, seq_length=2048, tokens_per_second=5e5, matmul_rate=rate)

The denominator is measured and not a data sheet's: data sheets state rates that no matrix product reaches, and the
clock of a device depends on its power limit.
"""

from __future__ import annotations

import time

import torch

from minimind_mcore.models.config import ModelConfig
from minimind_mcore.platform import device

LARGEST = 8192  # rows of the matrices; an H100 multiplies two of them in 1.4 ms
ENOUGH_SECONDS = 1e-3  # one product of this length hides the launch of a kernel


def mfu(config: ModelConfig, seq_length: int, tokens_per_second: float, matmul_rate: float) -> float:
    """Return the model FLOPs utilisation of one device.

    Args:
        config: the architecture.
        seq_length: tokens of a sequence; attention is counted causally.
        tokens_per_second: of this device.
        matmul_rate: FLOP/s of `matmul_rate`, measured in the same run.
    """
    return config.flops_per_token(seq_length) * tokens_per_second / matmul_rate


def matmul_rate(dtype: torch.dtype, largest: int = LARGEST, repeats: int = 10) -> float:
    """Measure the rate of matrix products on this process's device, in FLOP/s.

    The matrices are square and random (zeros multiply faster on a GPU, as they take less power). Their size doubles
    from 512 until one product takes `ENOUGH_SECONDS`, or reaches `largest`. The result is the median of three
    measurements of `repeats` products.
    """
    place, size = device.current().torch_device, min(512, largest)
    # Numbers from the device's own generator would be missing in the dropout of a run that is resumed.
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
    """Seconds of one product, the mean of several after one that does not count."""
    torch.mm(left, right, out=out)
    device.synchronize()
    started = time.perf_counter()
    for _ in range(repeats):
        torch.mm(left, right, out=out)
    device.synchronize()
    return (time.perf_counter() - started) / repeats
