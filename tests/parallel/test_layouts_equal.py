"""A training run gives the same losses and gradient norms in every parallel layout, on both megatron-cores."""

from __future__ import annotations

from typing import Any

import pytest
from helpers.engine import Corpus, Run, Server, layout, worst_difference

from minimind_mcore.models.presets import PRESETS

Layout = tuple[int, dict[str, Any]]  # processes, flags

DENSE: dict[str, Layout] = {
    "TP2": (2, layout(tp=2, micro_batch_size=8)),
    "TP2 SP": (2, layout(tp=2, sequence_parallel=True)),
    "PP2": (2, layout(pp=2)),
    "PP2 VPP2": (2, layout(pp=2, per_virtual_stage=1)),
    "TP2 PP2": (4, layout(tp=2, pp=2)),
    "TP2 SP PP2 VPP2": (4, layout(tp=2, pp=2, per_virtual_stage=1, sequence_parallel=True)),
    "DP2": (2, layout()),
    "DP2 distributed optimizer": (2, layout(use_distributed_optimizer=True)),
    "DP2 overlapped": (
        2,
        layout(use_distributed_optimizer=True, overlap_grad_reduce=True, overlap_param_gather=True),
    ),
    "PP2 DP2 VPP2 overlapped": (
        4,
        layout(
            pp=2, per_virtual_stage=1, use_distributed_optimizer=True, overlap_grad_reduce=True,
            overlap_param_gather=True, micro_batch_size=2,
        ),
    ),
    "full recompute": (1, layout(recompute_granularity="full", recompute_method="uniform")),
    "selective recompute": (1, layout(recompute_activations=True)),
    "TP2 SP PP2 full recompute": (
        4,
        layout(tp=2, pp=2, sequence_parallel=True, recompute_granularity="full", recompute_method="block"),
    ),
}  # fmt: skip
EXPERTS: dict[str, Layout] = {
    "EP2": (2, layout(ep=2)),
    "EP2 distributed optimizer": (2, layout(ep=2, use_distributed_optimizer=True)),
    "TP2 SP": (2, layout(tp=2, sequence_parallel=True)),
    "PP2 EP2": (4, layout(pp=2, ep=2)),
    "TP2 SP EP2": (4, layout(tp=2, ep=2, sequence_parallel=True)),
}
OLD_CORE = ("TP2 SP", "PP2 VPP2", "DP2 distributed optimizer", "DP2 overlapped", "EP2", "TP2 SP EP2")
MODELS = ("minimind3_tiny", "minimind3_moe_tiny", "minimind2_moe_tiny")
CASES = [(model, name) for model in MODELS for name in (EXPERTS if "moe" in model else DENSE)]
_runs: dict[Any, Run] = {}


def train(server: Server, corpus: Corpus, tmp: pytest.TempPathFactory, model: str, wanted: Layout) -> Run:
    """The run of a layout; each is made once."""
    processes, flags = wanted
    key = (id(server), model, processes, repr(flags))
    if key not in _runs:
        argv = corpus.flags(PRESETS[model], **flags)
        _runs[key] = server.run(argv, tmp.mktemp("run"), processes)
    return _runs[key]


def check_equal(found: Run, expected: Run) -> None:
    losses, norms = expected.column(), expected.column("grad_norm")
    assert len(losses) == 10 and losses[-1] < losses[0] - 0.1, "it must learn something"
    pairs = [(found.column(), losses), (found.column("grad_norm"), norms)]
    differences = [worst_difference(*pair) for pair in pairs]
    print("largest relative difference of losses and gradient norms:", *differences)
    assert max(differences) <= 1e-5
    if (names := aux_columns(expected)) or aux_columns(found):
        assert found.column(aux_columns(found)[0]) == pytest.approx(expected.column(names[0]), rel=1e-5)


def aux_columns(run: Run) -> list[str]:
    """Its auxiliary loss; 0.16.1 names the sequence-level one apart."""
    return [name for name in run.rows[0] if name.endswith("load_balancing_loss")]


@pytest.mark.parametrize(("model", "name"), CASES)
def test_layout_trains_as_one_process(
    server: Server, corpus: Corpus, tmp_path_factory: pytest.TempPathFactory, model: str, name: str
) -> None:
    expected = train(server, corpus, tmp_path_factory, model, (1, layout()))
    found = train(server, corpus, tmp_path_factory, model, (EXPERTS if "moe" in model else DENSE)[name])
    check_equal(found, expected)


@pytest.mark.parametrize(("model", "name"), [case for case in CASES if case[1] in OLD_CORE])
def test_layout_trains_as_one_process_on_core_012(
    server: Server,
    server_012: Server,
    corpus: Corpus,
    tmp_path_factory: pytest.TempPathFactory,
    model: str,
    name: str,
) -> None:
    expected = train(server, corpus, tmp_path_factory, model, (1, layout()))
    found = train(server_012, corpus, tmp_path_factory, model, (EXPERTS if "moe" in model else DENSE)[name])
    check_equal(found, expected)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("name", ["TP2 SP", "DP2 distributed optimizer"])
def test_half_precision_stays_near_fp32(
    server: Server, corpus: Corpus, tmp_path_factory: pytest.TempPathFactory, precision: str, name: str
) -> None:
    expected = train(server, corpus, tmp_path_factory, "minimind3_tiny", (1, layout()))
    processes, flags = DENSE[name]
    changes = {precision: True, **({"initial_loss_scale": 1024} if precision == "fp16" else {})}
    found = train(server, corpus, tmp_path_factory, "minimind3_tiny", (processes, flags | changes))
    assert found.rows[-1]["skipped_iterations"] == 0
    print("largest relative difference of losses:", worst_difference(found.column(), expected.column()))
    assert 0 < worst_difference(found.column(), expected.column()) < 5e-3
