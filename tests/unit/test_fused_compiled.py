"""The formulas that a GPU runs compiled: here without code generation, so that no compiler is needed."""

from __future__ import annotations

import functools
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from helpers.engine import ROOT
from torch import Tensor
from torch.multiprocessing.spawn import spawn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from minimind_mcore.platform import device
from minimind_mcore.platform.fused import compiled
from minimind_mcore.platform.fused import cross_entropy as fused_cross_entropy
from minimind_mcore.platform.fused.cross_entropy import cross_entropy


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


def in_blocks(rows: int, logits: Tensor, labels: Tensor) -> Tensor:
    """The loss with blocks of `rows` rows."""
    with mock.patch.object(fused_cross_entropy, "block_rows", return_value=rows):
        return cross_entropy(logits, labels)


@pytest.mark.parametrize("processes", [1, 2])
def test_cross_entropy_of_a_split_vocabulary(processes: int, tmp_path: Path) -> None:
    spawn(_cross_entropy, (processes, str(tmp_path / "rendezvous")), processes)


def join(rank: int, processes: int, rendezvous: str) -> None:
    """Set up a rank of a tensor-parallel group on the CPU."""
    os.environ |= {"DEVICE": "cpu", "RANK": str(rank), "WORLD_SIZE": str(processes)}
    torch.set_num_threads(1)
    device.setup()
    from megatron.core import parallel_state

    torch.distributed.init_process_group("gloo", f"file://{rendezvous}", rank=rank, world_size=processes)
    parallel_state.initialize_model_parallel(processes)


def _cross_entropy(rank: int, processes: int, rendezvous: str) -> None:
    """One rank's part of the vocabulary against torch's cross-entropy of all of it: a GPU's functions, and a CPU's."""
    join(rank, processes, rendezvous)
    in_large_blocks = functools.partial(in_blocks, fused_cross_entropy.GPU_BLOCK)
    compiled.compiled = functools.cache(functools.partial(torch.compile, backend="aot_eager"))  # type: ignore[assignment]
    mine = slice(rank * 12 // processes, (rank + 1) * 12 // processes)
    functions = (compiled.cross_entropy, cross_entropy, in_large_blocks)
    for dtype, bound in DTYPES:
        for function, length in itertools.product(functions, (5, 9, 1, 50)):
            whole, labels = 9 * normal(length, 2, 12), torch.arange(2 * length).view(length, 2) % 12
            wide, narrow = whole.clone().requires_grad_(), whole[..., mine].to(dtype).requires_grad_()
            expected = F.cross_entropy(wide.flatten(0, 1), labels.flatten(), reduction="none").view(labels.shape)
            found, grad = function(narrow, labels), normal(length, 2, seed=3)
            expected.backward(grad)
            found.backward(grad.float())
            assert wide.grad is not None and narrow.grad is not None
            assert found.dtype == torch.float32 and narrow.grad.dtype == dtype
            for a, b in ((found, expected.detach()), (narrow.grad, wide.grad[..., mine])):
                assert float((a.detach().double() - b).norm() / b.norm()) < bound
    # A process that ends with its groups open can die of SIGABRT: Gloo's threads outlive the interpreter.
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


class LargestWide(TorchDispatchMode):
    """The most elements of an fp32 tensor that an operation returns."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.dtype == torch.float32:
                self.elements = max(self.elements, leaf.numel())
        return result


def test_the_loss_holds_no_fp32_logits_of_the_whole_vocabulary(tmp_path: Path) -> None:
    spawn(_fp32_logits, (1, str(tmp_path / "rendezvous")), 1)


def _fp32_logits(rank: int, processes: int, rendezvous: str) -> None:
    """Measure the largest fp32 tensor of the patched loss, with the blocks of a CPU and of a GPU, and of torch's."""
    join(rank, processes, rendezvous)
    from megatron.core import tensor_parallel

    vocabulary, length = 16, 5000  # 10,000 rows
    logits = normal(length, 2, vocabulary).bfloat16().requires_grad_()
    labels = torch.arange(2 * length).view(length, 2) % vocabulary

    def largest(loss: Callable[[Tensor, Tensor], Tensor]) -> int:
        logits.grad = None
        with LargestWide() as mode:
            loss(logits, labels).sum().backward()
        assert logits.grad is not None
        return mode.elements

    def plain(logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits.float().flatten(0, 1), labels.flatten())

    assert largest(plain) == logits.numel()  # the measurement sees such a tensor
    rows = 2 * length
    # Each of the sums and of the labels' logits has one number a row; both are stacked once.
    assert largest(tensor_parallel.vocab_parallel_cross_entropy) == 2 * rows < logits.numel() / 4
    block = fused_cross_entropy.GPU_BLOCK
    assert largest(functools.partial(in_blocks, block)) == block * vocabulary < logits.numel() / 4
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


BUFFER = re.compile(r"empty_strided_cpu\(\(([^)]*)\), \([^)]*\), torch\.(\w+)\)")


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="torch's compiler needs g++ on a CPU")
def test_the_compiled_loss_holds_no_fp32_logits_of_the_whole_vocabulary() -> None:
    from torch._inductor.utils import run_and_get_code

    vocabulary = 6400
    rows = normal(64, vocabulary).bfloat16()
    local, column = torch.arange(64)[:, None], torch.zeros(64, 1)

    def buffers(function: Callable[..., Tensor], *inputs: Tensor) -> set[tuple[bool, str]]:
        """Of each tensor that the generated code allocates: whether it is as wide as the vocabulary, and the dtype."""
        compiled.compiled.cache_clear()  # type: ignore[attr-defined]
        _, code = run_and_get_code(compiled.compiled(function), *map(compiled._dynamic, inputs))
        found = BUFFER.findall("\n".join(code))
        return {(str(vocabulary) in sizes.split(", "), dtype) for sizes, dtype in found}

    assert buffers(lambda x: x.float() * 2, rows) == {(True, "float32")}  # the measurement sees such a tensor
    assert (True, "float32") not in buffers(compiled._largest, rows)
    assert buffers(compiled._sums, rows, local, column) <= {(False, "float32"), (False, "int64")}
    assert buffers(compiled._logits_gradient, rows, local, column, column) == {(True, "bfloat16")}
