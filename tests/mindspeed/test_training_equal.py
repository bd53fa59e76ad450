"""MindSpeed-LLM's own training with our spec equals the native engine on the same command line."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from helpers import engine, rehearsal
from helpers.engine import worst_difference
from helpers.rehearsal import Pretrain

from minimind_mcore.checkpoint.opening import open_source

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

FUSED = {"npu_rms_norm", "npu_rotary_position_embedding", "npu_fusion_attention"}
RUNS = {
    "minimind3": ("minimind3", {}),
    "minimind3 TP2": ("minimind3", {"tp": 2}),
    "minimind3 PP2": ("minimind3", {"pp": 2}),
    "minimind3_moe": ("minimind3_moe", {}),
    "minimind3_moe TP2": ("minimind3_moe", {"tp": 2}),
    "minimind3_moe PP2": ("minimind3_moe", {"pp": 2}),
    "minimind3_moe EP2": ("minimind3_moe", {"ep": 2}),
    "minimind3_moe_softmax": ("minimind3_moe_softmax", {}),
    "minimind3_moe_softmax EP2": ("minimind3_moe_softmax", {"ep": 2}),
    "minimind3_moe_straight_through": ("minimind3_moe_straight_through", {}),
    "minimind3_moe_straight_through TP2": ("minimind3_moe_straight_through", {"tp": 2}),
    "minimind3_moe_straight_through PP2": ("minimind3_moe_straight_through", {"pp": 2}),
    "minimind3_moe_straight_through EP2": ("minimind3_moe_straight_through", {"ep": 2}),
    "minimind2": ("minimind2", {}),
    "minimind2_moe": ("minimind2_moe", {}),
}


@pytest.mark.parametrize("name", RUNS)
def test_losses_are_the_native_engines(name: str, pretrain: Pretrain, server: engine.Server, tmp_path: Path) -> None:
    model, parallel = RUNS[name]
    theirs, _ = pretrain(model, **parallel)
    flags = [*rehearsal.program_flags(theirs), "--save", str(tmp_path / "checkpoints")]
    ours = server.run(flags, tmp_path / "run", rehearsal.processes(**parallel))
    assert theirs.iterations == list(range(1, 11))
    assert worst_difference(ours.column(), theirs.losses) < 1e-5  # 1e-4 is promised
    assert worst_difference(ours.column("grad_norm"), theirs.grad_norms) < 1e-3  # printed with three decimals


@pytest.mark.parametrize("rule", ["normalized", "softmax", "straight_through"])
def test_its_checkpoint_keeps_the_router_weight(rule: str, pretrain: Pretrain) -> None:
    model = "minimind3_moe" if rule == "normalized" else f"minimind3_moe_{rule}"
    config = open_source(pretrain(model)[1]).config
    assert config.moe and (config.moe.router_weight or "normalized") == rule


@pytest.mark.parametrize("name", RUNS)
def test_the_fused_operators_ran(name: str, pretrain: Pretrain) -> None:
    model, parallel = RUNS[name]
    called = pretrain(model, **parallel)[0].operators
    # The experts' SwiGLU is fused by --moe-grouped-gemm alone, which wants bf16.
    expected = FUSED if model.startswith("minimind3_moe") else FUSED | {"npu_swiglu"}
    assert expected <= called.keys() and all(called[name] > 0 for name in expected), called
    layers, updates, micro_batches = rehearsal.MODELS[model].num_layers, 10, 2
    # Of rank 0: a pipeline stage has its layers, a data-parallel rank its micro-batches.
    assert called["npu_fusion_attention"] == layers * updates * micro_batches // math.prod(
        parallel.get(name, 1) for name in ("pp", "ep")
    )
