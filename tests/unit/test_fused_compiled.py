"""The formulas that a GPU runs compiled: here without code generation, so that no compiler is needed."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.multiprocessing.spawn import spawn

from minimind_mcore.platform import device
from minimind_mcore.platform.fused import compiled


@pytest.fixture(autouse=True)
def traced(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Trace, differentiate and partition as for a GPU, and run the result operation by operation."""
    torch._dynamo.reset()
    monkeypatch.setattr(compiled, "compiled", functools.cache(functools.partial(torch.compile, backend="aot_eager")))
    yield
    torch._dynamo.reset()


def check(
    found: Callable[..., Tensor],
    expected: Callable[..., Tensor],
    inputs: list[Tensor],
    dtype: torch.dtype,
    bound: float,
) -> None:
    """Compare a result and the gradients of its inputs with float64."""
    wide = [x.clone().requires_grad_(x.is_floating_point()) for x in inputs]
    narrow = [x.to(dtype).requires_grad_() if x.is_floating_point() else x for x in inputs]
    right, out = expected(*wide), found(*narrow)
    grad = torch.randn(right.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
    right.backward(grad)
    out.backward(grad.to(out.dtype))
    pairs = [(out, right), *((a.grad, b.grad) for a, b in zip(narrow, wide, strict=True) if b.grad is not None)]
    for a, b in pairs:
        assert a is not None and a.shape == b.shape
        assert float((a.detach().double() - b.detach()).norm() / b.detach().norm()) < bound


SHAPES = [(7, 2, 16), (5, 3, 16), (7, 2, 4, 8), (9, 2, 2, 8), (1, 1, 1, 8)]
DTYPES = [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("dtype", "bound"), DTYPES)
def test_norm_activation_and_rotation(dtype: torch.dtype, bound: float) -> None:
    def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
        return weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)

    def swiglu(x: Tensor) -> Tensor:
        gate, up = x.chunk(2, dim=-1)
        return gate * torch.sigmoid(gate) * up

    for shape in SHAPES:  # one compiled function serves them all
        x, weight = normal(*shape), normal(shape[-1], seed=1)
        angles = normal(shape[0], *[1] * (len(shape) - 2), shape[-1] // 2, seed=2)
        cos, sin = angles.cos(), angles.sin()

        def rotate(x: Tensor, cos: Tensor = cos, sin: Tensor = sin) -> Tensor:
            left, right = x.chunk(2, dim=-1)
            return torch.cat((left * cos - right * sin, right * cos + left * sin), dim=-1)

        check(lambda x, w: compiled.rms_norm(x, w, 1e-5), rms_norm, [x, weight], dtype, bound)
        check(compiled.swiglu, swiglu, [x], dtype, bound)
        turned = functools.partial(compiled.rotate, cos=cos.to(dtype), sin=sin.to(dtype))
        check(turned, rotate, [x], dtype, bound)


@pytest.mark.parametrize("processes", [1, 2])
def test_cross_entropy_of_a_split_vocabulary(processes: int, tmp_path: Path) -> None:
    spawn(_cross_entropy, (processes, str(tmp_path / "rendezvous")), processes)


def _cross_entropy(rank: int, processes: int, rendezvous: str) -> None:
    """One rank's part of the vocabulary against torch's cross-entropy of all of it."""
    os.environ |= {"DEVICE": "cpu", "RANK": str(rank), "WORLD_SIZE": str(processes)}
    torch.set_num_threads(1)
    device.setup()
    from megatron.core import parallel_state

    torch.distributed.init_process_group("gloo", f"file://{rendezvous}", rank=rank, world_size=processes)
    parallel_state.initialize_model_parallel(processes)
    compiled.compiled = functools.cache(functools.partial(torch.compile, backend="aot_eager"))  # type: ignore[assignment]
    mine = slice(rank * 12 // processes, (rank + 1) * 12 // processes)
    for dtype, bound in DTYPES:
        for length in (5, 9, 1):
            whole, labels = 9 * normal(length, 2, 12), torch.arange(2 * length).view(length, 2) % 12
            wide, narrow = whole.clone().requires_grad_(), whole[..., mine].to(dtype).requires_grad_()
            expected = F.cross_entropy(wide.flatten(0, 1), labels.flatten(), reduction="none").view(labels.shape)
            found, grad = compiled.cross_entropy(narrow, labels), normal(length, 2, seed=3)
            expected.backward(grad)
            found.backward(grad.float())
            assert wide.grad is not None and narrow.grad is not None
            assert found.dtype == torch.float32 and narrow.grad.dtype == dtype
            for a, b in ((found, expected.detach()), (narrow.grad, wide.grad[..., mine])):
                assert float((a.double() - b).norm() / b.norm()) < bound
