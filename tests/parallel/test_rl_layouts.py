"""One step of reinforcement learning is the same in every parallel layout, and the rollout engine gets its weights."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import engine, rl_rank
from helpers.rl_trees import tree

from minimind_mcore.models.presets import PRESETS
from minimind_mcore.rl.runtime.batch import Batch

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "tp2": (2, {"tensor_model_parallel_size": 2}),
    "tp2_sp": (2, {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
    "pp2": (2, {"pipeline_model_parallel_size": 2}),
    "dp2": (2, {}),
    "dp2_tokens": (2, {}),
}


def run(server: engine.Server, folder: Path, task: dict[str, Any], processes: int = 1) -> dict[str, Any]:
    """What `rl_rank` finds."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(task, folder / "task.pt")
    server.run(["--task", str(folder / "task.pt")], folder, processes, module="helpers.rl_rank")
    found: dict[str, Any] = torch.load(folder / "found.pt", weights_only=False)
    return found


MIXTURE = "minimind3_moe_tiny"


def prompts() -> list[list[int]]:
    numbers = torch.Generator().manual_seed(1)
    return [torch.randint(40, 500, (n,), generator=numbers).tolist() for n in (5, 11, 8, 3)]


@pytest.fixture(scope="module")
def alone(server: engine.Server, corpus: engine.Corpus, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A step in a single process, on responses that a rollout engine wrote with its weights."""
    task = {"tree": tree(corpus), "prompts": prompts(), "updates": 2}
    return run(server, tmp_path_factory.mktemp("alone"), task)


def difference(a: torch.Tensor, b: torch.Tensor, batch: Batch) -> float:
    """Largest, over the tokens of the responses."""
    return float((a - b)[batch.mask.bool()].abs().max())


def test_trainer_and_rollout_engine_agree(alone: dict[str, Any], corpus: engine.Corpus) -> None:
    batch = Batch(**alone["batch"])
    assert batch.rollout_logp is not None
    assert difference(alone["before"]["logp"], batch.rollout_logp, batch) <= 1e-4
    assert torch.equal(alone["before"]["logp"], alone["reference"]["logp"])
    # The weights after the updates, in the engine's model, by transformers' own forward pass.
    config = PRESETS["minimind3_tiny"].replace(vocab_size=corpus.vocab_size)
    model = rl_rank.engine_with(config, alone["weights_after"]).model
    with torch.no_grad():
        logp = (model(batch.tokens).logits / rl_rank.DRAW.temperature).log_softmax(-1)
    rows = torch.arange(len(batch))[:, None]
    expected = logp[rows, batch.response_positions - 1, batch.responses]
    assert difference(alone["after"]["logp"], expected, batch) <= 1e-4
    assert difference(alone["after"]["logp"], alone["before"]["logp"], batch) > 1e-3, "the updates changed nothing"


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_step_is_the_same_in_every_layout(
    name: str, alone: dict[str, Any], server: engine.Server, corpus: engine.Corpus, tmp_path: Path
) -> None:
    processes, changes = LAYOUTS[name]
    changed = copy.deepcopy(tree(corpus, **changes))
    if name == "dp2_tokens":  # micro-batches of at most 64 tokens: unlike numbers of responses
        sizes = {f"{phase}_max_packing_token_size": 64 for phase in ("actor", "ref", "update")}
        changed["rl_config"] |= {"use_dynamic_bsz": True, "update_dynamic_max_batch_size": 3, **sizes}
    task = {"tree": changed, "batch": alone["batch"], "updates": 2}
    require_same(run(server, tmp_path, task, processes), alone)


def test_a_step_of_a_mixture_is_the_same_with_its_experts_on_two_ranks(
    server: engine.Server, corpus: engine.Corpus, tmp_path: Path
) -> None:
    alone = run(server, tmp_path / "alone", {"tree": tree(corpus, MIXTURE), "prompts": prompts(), "updates": 2})
    changed = tree(corpus, MIXTURE, expert_model_parallel_size=2)
    task = {"tree": changed, "batch": alone["batch"], "updates": 2}
    require_same(run(server, tmp_path / "ep2", task, 2), alone)


def require_same(found: dict[str, Any], alone: dict[str, Any]) -> None:
    """A step in a layout has the log-probabilities, metrics and weights of a step in a single process."""
    batch = Batch(**alone["batch"])
    assert batch.rollout_logp is not None
    assert difference(found["before"]["logp"], batch.rollout_logp, batch) <= 1e-4
    assert difference(found["before"]["entropy"], alone["before"]["entropy"], batch) <= 1e-4
    for mine, expected in zip(found["metrics"], alone["metrics"], strict=True):
        assert mine == pytest.approx(expected, rel=1e-4, abs=1e-6)
        assert expected["actor/grad_norm"] > 1e-2
    for key in ("weights", "weights_after"):
        assert found[key].keys() == alone[key].keys()
    assert all(torch.equal(found["weights"][n], alone["weights"][n]) for n in alone["weights"])
    assert difference(found["after"]["logp"], alone["after"]["logp"], batch) <= 1e-4
