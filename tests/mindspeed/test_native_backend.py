"""BACKEND=native under MindSpeed's patches logs and evaluates what it does without them, over all ranks.

MindSpeed is 26.1.0, and core_r0.16.0 where MINDSPEED_016_HOME and MEGATRON_016_HOME name its sources.
"""

from __future__ import annotations

import functools
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from helpers import rehearsal
from helpers.engine import read_rows, worst_difference
from helpers.rehearsal import Inputs, Result

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


def test_two_data_parallel_ranks_log_the_mean_of_both(inputs: Inputs, tmp_path: Path) -> None:
    environment = rehearsal.SETTINGS | inputs.environment | {"TP": "1", "NPUS_PER_NODE": "2", "BACKEND": "native"}
    environment |= {"MODEL": str(inputs.model("minimind3")), "DATA_PATH": str(inputs.folder / "text.jsonl")}
    environment |= {"SPLIT": "80,20,0", "EVAL_ITERS": "1", "EVAL_INTERVAL": "5", "MBS": "1"}
    found = {}
    for name, rehearse in (("mindspeed", True), ("plain", False)):
        folder = tmp_path / name
        result = rehearsal.run_script("pretrain", rehearse=rehearse, **environment, OUTPUT_DIR=str(folder))
        assert "DP=2 on 2 processes" in result.output
        assert ("npu: " in result.output) == rehearse
        found[name] = read_rows(folder)
    for column, count in (("lm_loss", 10), ("validation_loss", 2)):
        values = {name: [row[column] for row in rows if column in row] for name, rows in found.items()}
        assert len(values["plain"]) == count
        assert worst_difference(values["mindspeed"], values["plain"]) < 1e-5
    for rows in found.values():  # 4 sequences of 64 tokens in a step
        steps = [row for row in rows if "lm_loss" in row]
        tokens = [row["tokens_per_second"] * row["seconds_per_iteration"] for row in steps]
        assert tokens == pytest.approx([256] * 10, rel=1e-3)


def test_packed_fine_tuning_is_that_without_mindspeed(
    inputs: Inputs, weights: Callable[..., Path], tmp_path: Path
) -> None:
    """MindSpeed's patches for --reset-attention-mask would look for the batches of MindSpeed-LLM."""
    environment = rehearsal.SETTINGS | inputs.environment | rehearsal.layout() | {"BACKEND": "native", "PACK": "1"}
    environment |= {"MODEL": str(inputs.model("minimind3")), "DATA_PATH": str(inputs.folder / "chats.jsonl")}
    environment |= {"SEQ_LENGTH": "128", "CKPT_LOAD_DIR": str(weights("minimind3")), "MBS": "1"}
    losses = {}
    for name, rehearse in (("mindspeed", True), ("plain", False)):
        folder = tmp_path / name
        rehearsal.run_script("tune_minimind_full_ptd.sh", rehearse=rehearse, **environment, OUTPUT_DIR=str(folder))
        losses[name] = [row["lm_loss"] for row in read_rows(folder) if "lm_loss" in row]
    assert len(losses["plain"]) == 10
    assert worst_difference(losses["mindspeed"], losses["plain"]) < 1e-5


@dataclass(frozen=True)
class Case:
    """What is rehearsed on MindSpeed core_r0.16.0.

    Attributes:
        model: one of `rehearsal.MODELS`.
        layout: settings of the script.
        operators: how often rank 0 calls each fused operator in ten updates.
    """

    model: str
    layout: dict[str, str]
    operators: dict[str, int]


HOMES_016 = ("MINDSPEED_016_HOME", "MEGATRON_016_HOME")
# Ten updates, two micro-batches each, two layers. A layer of minimind-3 has four norms, the last stage one more.
DENSE = {"npu_rms_norm": 180, "npu_rotary_mul": 80, "npu_fusion_attention": 40, "npu_swiglu": 40}
CASES = {
    "minimind3": Case("minimind3", {}, DENSE),
    "minimind3 TP2": Case("minimind3", {"TP": "2", "NPUS_PER_NODE": "2"}, DENSE),
    "minimind3 PP2": Case(
        "minimind3",
        {"PP": "2", "NPUS_PER_NODE": "2"},
        {name: count // 2 for name, count in DENSE.items()} | {"npu_rms_norm": 80},
    ),
    "minimind3 DP2": Case("minimind3", {"NPUS_PER_NODE": "2", "MBS": "1"}, DENSE),
    "minimind3_moe": Case("minimind3_moe", {}, DENSE | {"npu_swiglu": 158}),  # one for each expert with tokens
    "minimind3_moe EP2": Case(
        "minimind3_moe", {"EP": "2", "NPUS_PER_NODE": "2", "MBS": "1"}, DENSE | {"npu_swiglu": 80}
    ),
    "minimind2": Case("minimind2", {}, DENSE | {"npu_rms_norm": 100}),  # no norms of queries and keys
}


@pytest.fixture(scope="module")
def core_016(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Settings that put MindSpeed core_r0.16.0 and Megatron-LM core_v0.16.1 under the stand-in."""
    unset = [name for name in HOMES_016 if not os.environ.get(name)]
    if unset:
        pytest.skip(f"{', '.join(unset)} not set: no sources of MindSpeed core_r0.16.0 and Megatron-LM core_v0.16.1")
    mindspeed, megatron = map(rehearsal.home, HOMES_016)
    copy = tmp_path_factory.mktemp("megatron-lm")  # Megatron-LM compiles a helper in its own folder
    shutil.copytree(megatron / "megatron", copy / "megatron")
    paths = [rehearsal.ROOT / "rehearsal/minimind_mcore_rehearsal/python", mindspeed, copy]
    return {
        "DEVICE": "npu", "PYTHON": str(rehearsal.PYTHON), "PYTHONPATH": os.pathsep.join(map(str, paths)),
        "PATH": f"{rehearsal.PYTHON.parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPYCACHEPREFIX": str(copy / "pycache"), "TORCH_EXTENSIONS_DIR": str(copy / "torch_extensions"),
        "NPU_EMULATION_TRACE": "1", "NPU_EMULATION_STRICT": "raise", "NPU_EMULATION_VERSION": "2.10.0",
    }  # fmt: skip


@pytest.fixture(scope="module")
def plain(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], list[float]]:
    """The losses of ten updates of a model on one CPU process, with a micro-batch size."""

    @functools.cache
    def run(model: str, mbs: str) -> list[float]:
        return train(inputs, model, {"MBS": mbs}, tmp_path_factory.mktemp("plain"))[1]

    return run


def train(inputs: Inputs, model: str, settings: dict[str, str], folder: Path) -> tuple[Result, list[float]]:
    """Train the native engine ten updates from the weights of a model; return the losses of metrics.jsonl too."""
    environment = rehearsal.SETTINGS | inputs.environment | {"TP": "1", "NPUS_PER_NODE": "1"}
    environment |= {"MODEL": str(inputs.model(model)), "DATA_PATH": str(inputs.folder / "text.jsonl")}
    environment |= {"CKPT_LOAD_DIR": str(inputs.model(model)), "OUTPUT_DIR": str(folder)}
    result = rehearsal.run_script("pretrain", rehearse=False, **environment | settings)
    return result, [row["lm_loss"] for row in read_rows(folder) if "lm_loss" in row]


@pytest.mark.parametrize("name", CASES)
def test_mindspeed_core_r0_16_0(
    name: str,
    inputs: Inputs,
    core_016: dict[str, str],
    plain: Callable[[str, str], list[float]],
    tmp_path: Path,
) -> None:
    case = CASES[name]
    result, losses = train(inputs, case.model, core_016 | case.layout, tmp_path)
    assert "npu: " in result.output and len(losses) == 10
    assert worst_difference(losses, plain(case.model, case.layout.get("MBS", "2"))) < 1e-5
    assert {name: result.operators.get(name, 0) for name in case.operators} == case.operators
