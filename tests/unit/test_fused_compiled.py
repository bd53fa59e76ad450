"""The formulas that a GPU runs compiled: here without code generation, so that no compiler is needed."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers.engine import ROOT
from torch import Tensor
from torch.multiprocessing.spawn import spawn

from minimind_mcore.platform import device
from minimind_mcore.platform.fused import compiled


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


DTYPES = [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("dtype", "bound"), DTYPES)
def test_formulas(dtype: torch.dtype, bound: float) -> None:
    def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
        return weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)

    def swiglu(x: Tensor) -> Tensor:
        gate, up = x.chunk(2, dim=-1)
        return gate * torch.sigmoid(gate) * up

    def rotate(x: Tensor) -> Tensor:
        left, right = x.chunk(2, dim=-1)
        return torch.cat((left * cos - right * sin, right * cos + left * sin), dim=-1)

    x, weight, angles = normal(7, 2, 4, 8), normal(8, seed=1), normal(7, 1, 1, 4, seed=2)
    cos, sin = angles.cos(), angles.sin()
    check(lambda x, w: compiled.rms_norm(x, w, 1e-5), rms_norm, [x, weight], dtype, bound)
    check(compiled.swiglu, swiglu, [x], dtype, bound)
    check(lambda x: compiled.rotate(x, cos.to(dtype), sin.to(dtype)), rotate, [x], dtype, bound)


MODEL = """
import functools, json, sys
sys.path.append(sys.argv[1])
import torch
from minimind_mcore.platform import device
device.setup()
torch.set_num_threads(1)
from native_engine import NativeEngine
from minimind_mcore.platform.fused import compiled
from minimind_mcore.models.presets import get_preset

compile = torch.compile
# What the compiler cannot trace is an error, and not a cut; operations then run one by one, so no C compiler is needed.
torch.compile = functools.partial(compile, backend="aot_eager", fullgraph=True)
graphs = torch._dynamo.utils.counters["stats"]
found = {}
for on in (False, True):
    compiled.usable = lambda: on
    config = get_preset(sys.argv[2]).replace(vocab_size=64)
    engine = NativeEngine(config, 2, 24, sys.argv[3] == "bf16", micro_batches=2, flags=sys.argv[4:])
    numbers = torch.Generator().manual_seed(1)
    losses = [float(engine.step(torch.randint(0, 64, (4, n + 1), generator=numbers))) for n in (24, 24, 17)]
    found[str(on)] = {"losses": losses, "graphs": graphs["unique_graphs"]}
    engine.close()
print(json.dumps(found))
"""


@pytest.mark.parametrize(
    ("model", "precision", "flags", "graphs", "bound"),
    [
        ("minimind3_tiny", "fp32", (), 2, 1e-6),  # one for all layers; one more for another length
        ("minimind2_small_tiny", "bf16", (), 2, 1e-3),
        ("minimind3_tiny", "fp32", ("--use-distributed-optimizer", "--overlap-grad-reduce"), 2, 1e-6),
        ("minimind3_tiny", "fp32", ("--attention-dropout", "0.1"), 0, 0.0),  # these stay as they are
        ("minimind3_moe_tiny", "fp32", (), 0, 0.0),
    ],
)
def test_compiled_layers_train_as_others(
    model: str, precision: str, flags: tuple[str, ...], graphs: int, bound: float
) -> None:
    command = [sys.executable, "-c", MODEL, str(ROOT / "benchmarks"), model, precision, *flags]
    environment = os.environ | {"DEVICE": "cpu", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["False"]["graphs"] == 0 and found["True"]["graphs"] == graphs
    assert found["True"]["losses"] == pytest.approx(found["False"]["losses"], rel=bound)


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
                assert float((a.detach().double() - b).norm() / b.norm()) < bound
    # A process that ends with its groups open can die of SIGABRT: Gloo's threads outlive the interpreter.
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
