"""What a GPU would meet, on the CPU: torch's meta device stands for the GPU where only places matter."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import textwrap
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.engine import ROOT, Corpus, Server, load
from torch import Tensor
from torch.overrides import TorchFunctionMode

from minimind_mcore import arguments
from minimind_mcore.errors import UserError
from minimind_mcore.models.presets import PRESETS
from minimind_mcore.platform import device
from minimind_mcore.training.config import ObjectiveSection, TrainConfig
from minimind_mcore.validation import validate


def run_python(code: str, **variables: str) -> str:
    environment = os.environ | {"DEVICE": "cpu", "OMP_NUM_THREADS": "1"} | variables
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_setup_leaves_torch_compile_to_others() -> None:
    """Whoever is imported while megatron-core is, and decorates its functions, gets torch's own torch.compile."""
    found = run_python(
        """
        import sys, torch
        real, seen = torch.compile, []
        class Watch:
            def find_spec(self, name, path, target=None):
                seen.append(torch.compile is real)
        sys.meta_path.insert(0, Watch())
        from minimind_mcore.platform import device
        device.setup()
        import megatron.core.jit, megatron.core.fusions.fused_bias_gelu as fusion
        print(all(seen), len(seen) > 100, torch.compile is real, type(fusion.bias_gelu).__name__)
        """
    )
    assert found.split() == ["True", "True", "True", "function"]


def test_torch_compile_works_after_setup() -> None:
    found = run_python(
        """
        from minimind_mcore.platform import device
        device.setup()
        import torch
        from torch._inductor.codecache import CacheBase
        print(torch.compile(lambda x: 2 * x + 1, backend="aot_eager")(torch.ones(2)).tolist())
        print(sorted(CacheBase.get_system()["device"]))
        """
    )
    assert found.splitlines() == ["[3.0, 3.0]", "['name']"]


def test_setup_prepares_cublas_for_deterministic_mode() -> None:
    found = run_python("from minimind_mcore.platform import device; import os; device.setup(); print(dict(os.environ))")
    assert "'CUBLAS_WORKSPACE_CONFIG': ':4096:8'" in found


class NoWaiting(TorchFunctionMode):
    """Notes every call that makes the host wait for the device: copies from and to it, and questions about values."""

    WAITING = ("tensor", "as_tensor", "item", "tolist", "cpu", "nonzero", "__bool__", "__int__", "__float__", "numpy")

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        place = str((kwargs or {}).get("device", "cpu"))
        if name in self.WAITING and (place != "cpu" or any(isinstance(a, Tensor) and a.is_meta for a in args)):
            self.found.append(name)
        return func(*args, **(kwargs or {}))


def settings() -> TrainConfig:
    """Of a run of one process: two samples a micro-batch, no workers."""
    flags = "--seq-length 8 --micro-batch-size 2 --num-workers 0 --seed 1 --lr 1e-3 --train-iters 2".split()
    args = arguments.parse([*PRESETS["minimind3_tiny"].megatron_flags(), *flags])
    return TrainConfig.from_args(args, validate(args, 1))


def pretraining_loss(losses: Tensor, mask: Tensor) -> Tensor:
    from minimind_mcore.training.job import token_loss

    return token_loss(mask, losses)[0]


def dpo_loss(losses: Tensor, mask: Tensor) -> Tensor:
    from minimind_mcore.posttrain.dpo import pair_loss

    return pair_loss(ObjectiveSection(), {"loss_mask": mask}, losses)[0]


@pytest.mark.parametrize("loss", [pretraining_loss, dpo_loss])
def test_a_loss_does_not_wait_for_the_device(loss: Callable[[Tensor, Tensor], Tensor]) -> None:
    losses, mask = torch.rand(4, 8, device="meta", requires_grad=True), torch.ones(4, 8, device="meta")
    with NoWaiting() as calls:
        loss(losses, mask).backward()
    assert calls.found == []


def test_packed_lengths_and_indices_stay_on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every layer reads the lengths of packed samples; on the device each layer would wait for it."""
    from minimind_mcore.training import data
    from minimind_mcore.training.job import Job, MicroBatch

    class OnMeta:
        kind, is_ascend, torch_device = "cuda", False, torch.device("meta")

    class Packed(Job):
        def collate(self, samples: list[dict[str, Any]]) -> MicroBatch:
            ends = torch.tensor([0, 3, 8], dtype=torch.int32)
            return {"tokens": torch.zeros(1, 8, dtype=torch.long), "cu_seqlens": ends, "index": [4, 5]}

    monkeypatch.setattr(device, "current", OnMeta)
    core: Any = types.ModuleType("megatron.core")  # the real one is imported after device.setup() only
    core.parallel_state = types.SimpleNamespace(
        get_data_parallel_rank=lambda: 0, get_data_parallel_world_size=lambda: 1
    )
    monkeypatch.setitem(sys.modules, "megatron.core", core)
    config = settings()
    batch = next(data.micro_batches(config, Packed(config), [{}, {}], 0))
    assert batch["tokens"].device.type == "meta"
    assert batch["cu_seqlens"].device.type == "cpu" and batch["cu_seqlens"].tolist() == [0, 3, 8]
    assert list(batch["index"]) == [4, 5] and not isinstance(batch["index"], Tensor)


def test_a_checkpoint_of_another_kind_of_device_is_resumed(server: Server, corpus: Corpus, tmp_path: Path) -> None:
    """A GPU's generator has 16 bytes of state, which no CPU generator takes; the weights are what matters."""
    flags = {"train_iters": 4, "ckpt_format": "torch", "save": tmp_path / "saved", "save_interval": 2}
    whole = server.run(corpus.flags(PRESETS["minimind3_tiny"], **flags), tmp_path / "whole")
    file = tmp_path / "saved/iter_0000002/mp_rank_00/model_optim_rng.pt"
    state = load(file)
    for one in state["rng_state"]:
        one["cuda_rng_state"] = torch.zeros(16, dtype=torch.uint8)
        one["rng_tracker_states"] = {k: torch.zeros(16, dtype=torch.uint8) for k in one["rng_tracker_states"]}
    torch.save(state, file)
    for manifest in file.parents[1].glob("*.json"):  # its digests are of the file before
        manifest.unlink()
    argv = corpus.flags(PRESETS["minimind3_tiny"], **flags | {"save": None, "save_interval": None},
                        load=tmp_path / "saved", ckpt_step=2)  # fmt: skip
    resumed = server.run(argv, tmp_path / "resumed")
    assert resumed.column() == whole.column()[2:]
    assert "another kind of device" in resumed.output


def test_more_processes_than_gpus_need_gloo(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = device.Device("cuda", "a GPU", 1, 1 << 36)
    monkeypatch.setattr(device, "current", lambda: gpu)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert device.backend("gloo") == "gloo"
    with pytest.raises(UserError, match=r"2 processes .* 1 GPU.*--distributed-backend gloo"):
        device.backend("nccl")
    assert gpu.torch_device == torch.device("cuda", 0)  # they share it
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    assert device.backend("nccl") == "nccl"


@pytest.mark.parametrize(
    ("changes", "flag"),
    [
        ({"pp": 2}, "--pipeline-model-parallel-size"),
        ({"sequence_parallel": True}, "--sequence-parallel"),
        ({"use_distributed_optimizer": True}, "--use-distributed-optimizer"),
    ],
)
def test_layouts_that_gloo_cannot_run_on_a_gpu_are_refused(changes: dict[str, Any], flag: str) -> None:
    from minimind_mcore.checkpoint.layout import ParallelLayout
    from minimind_mcore.training.distributed import _require_simple

    two = dataclasses.replace(settings(), layout=ParallelLayout(world_size=2, tp=2))
    pp = dataclasses.replace(two, layout=ParallelLayout(world_size=2, pp=changes.get("pp", 1)))
    with pytest.raises(UserError, match=flag):
        _require_simple(pp.changed(**changes))
    _require_simple(two)


def test_gradients_are_reduced_without_coalescing(server: Server, corpus: Corpus, tmp_path: Path) -> None:
    """gloo coalesces no all-reduce of GPU tensors: bucket by bucket gives the same."""
    hook = tmp_path / "hook.py"
    hook.write_text(
        "import torch.distributed.distributed_c10d as c10d\n"
        "from minimind_mcore.platform import patches\n"
        "def before():\n"
        "    patches.reduce_one_by_one()\n"
        "    def refused(*args, **kwargs):\n"
        "        raise AssertionError('coalesced')\n"
        "    c10d._coalescing_manager = refused\n"
    )
    argv = corpus.flags(PRESETS["minimind3_tiny"], train_iters=3)
    one = server.run(argv, tmp_path / "one")
    two = server.run(argv, tmp_path / "two", processes=2, hook=f"{hook}:before")
    assert two.column() == pytest.approx(one.column(), rel=1e-6)


def test_fp32_attention_on_a_gpu_repeats_grouped_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    """With enable_gqa a GPU has no kernel for fp32 but the one that keeps all scores."""
    import torch.nn.functional as functional

    from minimind_mcore.platform.fused import attention

    asked: list[tuple[bool, int]] = []

    def noted(query: Tensor, key: Tensor, *args: Any, enable_gqa: bool = False, **more: Any) -> Tensor:
        asked.append((enable_gqa, key.shape[1]))
        return query

    monkeypatch.setattr(functional, "scaled_dot_product_attention", noted)
    for dtype in (torch.float32, torch.bfloat16):
        query, key = (torch.empty(1, heads, 4, 8, device="meta", dtype=dtype) for heads in (4, 2))
        attention.scaled_dot_product(query, key, key, None, True, 1.0)
        attention.scaled_dot_product(query, key, key, torch.ones(1, 1, 4, 4, dtype=torch.bool), False, 1.0)
    assert asked == [(False, 4), (False, 4), (True, 2), (False, 4)]
