"""MindSpeed-LLM in layouts, precisions and with features of its own equals the native engine in a single process."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pytest
from helpers import engine, rehearsal
from helpers.engine import worst_difference
from helpers.rehearsal import Inputs

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

# Flags that say how a model is computed, not what: the native engine of the comparison gets none of them.
HOW = (
    "--tensor-model-parallel-size", "--pipeline-model-parallel-size", "--expert-model-parallel-size",
    "--context-parallel-size", "--num-layers-per-virtual-pipeline-stage", "--sequence-parallel",
    "--use-distributed-optimizer", "--context-parallel-algo", "--num-layer-list", "--noop-layers", "--load", "--save",
    "--recompute-granularity", "--recompute-method", "--recompute-num-layers", "--recompute-activation-function",
    "--overlap-grad-reduce", "--overlap-param-gather", "--moe-grouped-gemm", "--moe-permutation-async-comm",
    "--moe-token-dispatcher-type", "--reuse-fp32-param", "--num-layers", "--spec",
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """What is rehearsed.

    Attributes:
        model: one of `rehearsal.MODELS`.
        layout: settings of the scripts, of conversion and training.
        flags: of the training.
        bound: largest relative difference of the losses.
        layers: that the training is told, where empty places count.
        operators: fused operators that must have run.
    """

    model: str = "minimind3_deep"
    layout: dict[str, str] = field(default_factory=dict)
    flags: tuple[str, ...] = ()
    bound: float = 1e-5
    layers: int = 0
    operators: tuple[str, ...] = ()


PP2, CP2 = {"PP": "2", "NPUS_PER_NODE": "2"}, {"CP": "2", "NPUS_PER_NODE": "2"}
DP2, MOE4 = {"NPUS_PER_NODE": "2", "MBS": "1"}, {"EP": "2", "TP": "2", "NPUS_PER_NODE": "4", "MBS": "1"}
GROUPED = ("--moe-grouped-gemm", "--moe-permutation-async-comm", "--moe-token-dispatcher-type", "alltoall_seq")
CASES = {
    "uneven stages": Case(layout=PP2 | {"NUM_LAYER_LIST": "1,3"}, flags=("--num-layer-list", "1,3")),
    "noop layers": Case(layout=PP2 | {"NOOP_LAYERS": "0,5"}, flags=("--noop-layers", "0,5"), layers=6),
    "virtual stages": Case(layout=PP2 | {"VPP": "1"}),
    "ulysses": Case(layout=CP2, flags=("--context-parallel-algo", "ulysses_cp_algo")),
    "ring": Case(
        layout=CP2, flags=("--context-parallel-algo", "megatron_cp_algo"), operators=("npu_fusion_attention_grad",)
    ),
    "full recomputation": Case(
        flags=("--recompute-granularity", "full", "--recompute-method", "uniform", "--recompute-num-layers", "1")
    ),
    "selective recomputation": Case(flags=("--recompute-activation-function",)),
    "overlap": Case(
        layout=DP2 | {"PRECISION": "bf16"}, bound=2e-2, flags=("--overlap-grad-reduce", "--overlap-param-gather")
    ),
    "fp16": Case(layout={"PRECISION": "fp16"}, bound=2e-2),
    "bf16 DP2": Case(layout=DP2 | {"PRECISION": "bf16"}, bound=2e-2),
    "reuse of fp32 parameters": Case(layout=DP2 | {"PRECISION": "bf16"}, flags=("--reuse-fp32-param",), bound=2e-2),
    "EP2 TP2": Case("minimind3_moe", layout=MOE4),
    "grouped matrix products": Case(
        "minimind3_moe", {"PRECISION": "bf16"}, GROUPED, 2e-2, operators=("npu_grouped_matmul",)
    ),
    "grouped matrix products EP2": Case(
        "minimind3_moe", {"PRECISION": "bf16", "EP": "2", "NPUS_PER_NODE": "2", "MBS": "1"}, GROUPED, 2e-2
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_losses_are_the_native_engines(name: str, inputs: Inputs, server: engine.Server, tmp_path: Path) -> None:
    case = CASES[name]
    environment = rehearsal.SETTINGS | inputs.environment | {"TP": "1", "NPUS_PER_NODE": "1"} | case.layout
    environment |= {"MODEL": str(inputs.model(case.model)), "DATA_PATH": str(inputs.folder / "text.jsonl")}
    conversion = {
        key: value for key, value in environment.items() if key in {"TP", "PP", "EP", "VPP"} | case.layout.keys()
    }
    grouped = [flag for flag in case.flags if flag == "--moe-grouped-gemm"]
    weights = {}
    for kind, how, extra in (("theirs", conversion, grouped), ("ours", {}, [])):
        weights[kind] = tmp_path / f"weights-{kind}"
        where = {"LOAD_DIR": str(inputs.model(case.model)), "SAVE_DIR": str(weights[kind]), "PRECISION": "fp32"}
        rehearsal.run_script("ckpt_convert_minimind_hf2mcore.sh", *extra, rehearse=False, **how | where)
    more = ["--num-layers", str(case.layers)] if case.layers else []
    where = {"OUTPUT_DIR": str(tmp_path / "theirs"), "CKPT_LOAD_DIR": str(weights["theirs"])}
    theirs = rehearsal.run_script("pretrain", *case.flags, *more, **environment | where)
    flags = rehearsal.drop(rehearsal.program_flags(theirs), *HOW)
    flags += ["--num-layers", str(rehearsal.MODELS[case.model].num_layers), "--load", str(weights["ours"])]
    flags += ["--save", str(tmp_path / "checkpoints")]
    ours = server.run(flags, tmp_path / "run", 1)
    assert theirs.iterations == list(range(1, 11))
    assert worst_difference(ours.column(), theirs.losses) < case.bound
    assert set(case.operators) <= theirs.operators.keys()
    assert "strict:" not in theirs.output
