"""The trainer sends tokens to the experts that the rollout engine chose."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import engine, rl_trees
from helpers.weights_on_disk import state_dict, write_hf

from minimind_mcore.models.presets import PRESETS
from minimind_mcore.rl.config.check import problems
from minimind_mcore.rl.config.load import resolve
from minimind_mcore.rl.runtime import batch as batches
from minimind_mcore.rl.runtime.batch import Batch

PROMPTS = [[50, 60, 70], [80, 90], [100, 110, 120, 130], [140, 41, 42]]


def tied(folder: Path, corpus: engine.Corpus, preset: str) -> Path:
    """A model whose experts differ and whose router cannot tell them apart: rounding chooses."""
    config = PRESETS[preset].replace(vocab_size=corpus.vocab_size)
    state = state_dict(config, "hf")
    numbers = torch.Generator().manual_seed(0)
    for name, tensor in state.items():
        if name.endswith("mlp.gate.weight"):
            tensor.copy_(tensor[:1] * (1 + 1e-7 * torch.randn(tensor.shape, generator=numbers)))
        elif ".experts." in name:
            tensor.mul_(8)
    return write_hf(folder, config, state)


def apart(found: dict[str, Any]) -> float:
    """Largest difference between the log-probabilities of trainer and engine."""
    batch = Batch(**found["batch"])
    assert batch.rollout_logp is not None
    return float((found["before"]["logp"] - batch.rollout_logp)[batch.mask.bool()].abs().max())


@pytest.mark.parametrize(
    ("preset", "processes", "layout"),
    [
        ("minimind3_moe_tiny", 1, {}),
        (
            "minimind2_moe_tiny",
            1,
            {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
        ),
        ("minimind3_moe_tiny", 2, {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
        ("minimind3_moe_tiny", 2, {"pipeline_model_parallel_size": 2}),
    ],
)
def test_the_ratio_is_1_before_the_first_update(
    preset: str, processes: int, layout: dict[str, Any], server: engine.Server, corpus: engine.Corpus, tmp_path: Path
) -> None:
    base = tied(tmp_path / "hf", corpus, preset)
    found: dict[bool, dict[str, Any]] = {}
    for replays in (True, False) if processes == 1 else (True,):
        tree = rl_trees.tree(corpus, preset, load=str(base), **layout)
        tree["rl_config"]["actor_resource"] = {"num_npus": processes}
        tree["minimind"]["router_replay"] = replays
        folder = tmp_path / str(replays)
        folder.mkdir()
        torch.save({"tree": tree, "prompts": PROMPTS, "updates": 1}, folder / "task.pt")
        server.run(["--task", str(folder / "task.pt")], folder, processes, module="helpers.rl_rank")
        found[replays] = torch.load(folder / "found.pt", weights_only=False)
    assert apart(found[True]) < 1e-4
    if processes == 1:
        assert apart(found[False]) > 1e-2
    assert found[True]["metrics"][0]["rollout/logp_diff"] < 1e-5
    assert found[True]["metrics"][0]["actor/grad_norm"] > 0


def test_routes_keep_their_places_in_parts_of_a_batch() -> None:
    def rows(lengths: list[tuple[int, int]]) -> Batch:
        routes = [torch.full((p + r - 1, 2, 1), p + r, dtype=torch.uint8).numpy() for p, r in lengths]
        ids = [([1] * p, [2] * r) for p, r in lengths]
        count = len(ids)
        logp = [[0.0] * len(r) for _, r in ids]
        return batches.make([p for p, _ in ids], [r for _, r in ids], logp, [True] * count, [0] * count, routes=routes)

    whole = batches.concat([rows([(2, 3)]), rows([(4, 6), (1, 1)])])
    assert whole.routes is not None and whole.routes.shape == (3, 10, 2, 1)
    assert whole.routes[:, :, 0, 0].sum(1).tolist() == [5 * 4, 10 * 9, 2 * 1]
    part = whole.select(torch.tensor([2, 0]))
    assert part.routes is not None and part.routes[:, :, 1, 0].tolist() == [[2, 0, 0, 0, 0], [5, 5, 5, 5, 0]]


@pytest.mark.parametrize(
    ("model", "more", "says"),
    [
        ("minimind3_tiny", {}, "the model has no experts"),
        ("minimind3_moe_tiny", {"rollout_engine": "vllm"}, "vllm gives no routes"),
    ],
)
def test_a_run_that_cannot_replay_is_refused(
    model: str, more: dict[str, Any], says: str, corpus: engine.Corpus, tmp_path: Path
) -> None:
    tree = rl_trees.run_tree(corpus, rl_trees.write_prompts(tmp_path / "prompts"), tmp_path)
    tree["model"] = rl_trees.tree(corpus, model)["model"]
    for section in ("megatron_training", "actor_config"):
        tree[section]["model"] = model
    tree["minimind"] |= {"router_replay": True, **more}
    found = [message for key, message in problems(resolve(tree), "embedded") if key == "minimind.router_replay"]
    assert found and says in found[0]
