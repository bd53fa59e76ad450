"""The rollout engine must compute what the trainer computes, and the loss must not depend on the micro-batches."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import engine, rl_ray, rl_trees
from helpers.weights_on_disk import state_dict, write_hf

from minimind_mcore.models.presets import PRESETS
from minimind_mcore.rl.runtime.batch import Batch


def forget_the_output_layer() -> None:
    """Break the engine as vLLM was once seen: the output layer, tied to the embedding, keeps its first values."""
    from minimind_mcore.inference.decoder import Decoder
    from minimind_mcore.rl.runtime.engines.decoder import DecoderEngine

    load = DecoderEngine.load_weights

    def incomplete(self: Any, whole: Any) -> None:
        load(self, whole)
        torch.manual_seed(0)
        output = self.model.get_output_embeddings()
        output.weight = torch.nn.Parameter(torch.randn_like(output.weight))
        self.decoder = Decoder(self.model)

    DecoderEngine.load_weights = incomplete  # type: ignore[method-assign]


def load_only_once() -> None:
    """Break the sync: the engine keeps the weights that the run began with, and that step 0 has checked."""
    from minimind_mcore.rl.runtime.engines.decoder import DecoderEngine

    load, loaded = DecoderEngine.load_weights, list[bool]()

    def once(self: Any, whole: Any) -> None:
        if len(loaded) < 2:
            load(self, whole)
        loaded.append(True)

    DecoderEngine.load_weights = once  # type: ignore[method-assign]


def run(
    server: engine.Server, corpus: engine.Corpus, folder: Path, hook: str | None = None, **rl: Any
) -> tuple[engine.Run, list[dict[str, Any]]]:
    """Four steps, saved after the second; the exit status is in what is returned."""
    tree = rl_trees.run_tree(corpus, rl_trees.write_prompts(folder / "prompts", 32), folder / "run")
    tree["rl_config"] |= rl
    file = folder / "tree.json"
    file.write_text(json.dumps(tree), encoding="utf-8")
    words = ["--tree", str(file)]
    done = server.run(words, folder / "run", module="helpers.rl_local", check=False, hook=hook and f"{__file__}:{hook}")
    rows = rl_ray.rows(folder / "run") if (folder / "run/metrics.jsonl").exists() else []
    return done, rows


@pytest.mark.parametrize("blocking", [True, False])
def test_an_engine_with_other_weights_ends_the_run_at_the_first_step(
    blocking: bool, server: engine.Server, corpus: engine.Corpus, tmp_path: Path
) -> None:
    done, rows = run(server, corpus, tmp_path, "forget_the_output_layer", blocking=blocking)
    assert done.codes == [1], done.output
    last = done.output.strip().splitlines()[-1]
    assert last.startswith("error: rollout/logp_diff") and "expected at most 0.001 in fp32" in last
    assert not rows and not list((tmp_path / "run").glob("checkpoints/iter_*"))


@pytest.mark.parametrize(("blocking", "steps"), [(True, 1), (False, 2)])
def test_weights_that_no_longer_arrive_end_the_run(
    blocking: bool, steps: int, server: engine.Server, corpus: engine.Corpus, tmp_path: Path
) -> None:
    """Ahead, the second batch rightly comes from the first weights; the third does not."""
    done, rows = run(server, corpus, tmp_path, "load_only_once", blocking=blocking)
    assert done.codes == [1] and "error: rollout/logp_diff" in done.output, done.output
    assert [row["iteration"] for row in rows] == list(range(1, steps + 1))


def test_one_step_ahead_the_difference_is_taken_with_the_weights_that_wrote(
    server: engine.Server, corpus: engine.Corpus, tmp_path: Path
) -> None:
    done, rows = run(server, corpus, tmp_path, blocking=False)
    assert done.codes == [0] and len(rows) == 4, done.output
    assert all(row["rollout/logp_diff"] > 1e-3 for row in rows[1:])  # one update lies between
    assert all(row["rollout/logp_diff_same_weights"] < 1e-4 for row in rows)


def test_saved_responses_of_other_weights_still_train(
    server: engine.Server, corpus: engine.Corpus, tmp_path: Path
) -> None:
    tree = rl_trees.run_tree(corpus, rl_trees.write_prompts(tmp_path / "prompts", 32), tmp_path / "written")
    for name, more in (
        ("written", {"save_rollouts": str(tmp_path / "kept")}),
        ("again", {"replay_rollouts": str(tmp_path / "kept")}),
    ):
        changed = tree | {
            "actor_config": tree["actor_config"] | {"lr": 1e-3 if name == "written" else 3e-3, "save": None},
            "minimind": tree["minimind"] | more | {"output_dir": str(tmp_path / name)},
        }
        (tmp_path / f"{name}.json").write_text(json.dumps(changed), encoding="utf-8")
        server.run(["--tree", str(tmp_path / f"{name}.json")], tmp_path / name, module="helpers.rl_local")
    assert rl_ray.rows(tmp_path / "again")[-1]["rollout/logp_diff"] > 1e-3


def test_a_critic_begins_with_weights_of_its_own_model_alone(
    server: engine.Server, corpus: engine.Corpus, tmp_path: Path
) -> None:
    """The shapes are equal, and yet another norm epsilon or rotary base makes another function."""
    config = PRESETS["minimind3_tiny"].replace(vocab_size=corpus.vocab_size)
    for name, changes, says in (
        ("same", {}, ""),
        ("epsilon", {"rms_norm_eps": 1e-3}, "norm_eps is 0.001 there and 1e-06"),
        ("base", {"rope_theta": 1e4}, "rope_theta is 10000 there and 1000000"),
    ):
        written = write_hf(tmp_path / name, config, state_dict(config, "hf"), **changes)
        tree = rl_trees.tree(corpus, load=str(written))
        torch.save({"tree": tree, "role": "critic", "only_load": True}, tmp_path / "task.pt")
        words = ["--task", str(tmp_path / "task.pt")]
        done = server.run(words, tmp_path / f"{name}-run", module="helpers.rl_rank", check=False)
        assert done.codes == [bool(says)] and says in done.output, (name, done.output)


def test_fp16_trains_in_half_precision(server: engine.Server, corpus: engine.Corpus, tmp_path: Path) -> None:
    found: dict[str, dict[str, Any]] = {}
    for precision in ("fp32", "fp16"):
        tree = rl_trees.tree(corpus)
        tree["minimind"]["precision"] = precision
        task = {"tree": tree, "updates": 2, "prompts": [[50, 60, 70], [80, 90], [100, 110, 120, 130], [140]]}
        if found:
            task["batch"] = found["fp32"]["batch"]
        folder = tmp_path / precision
        folder.mkdir()
        torch.save(task, folder / "task.pt")
        server.run(["--task", str(folder / "task.pt")], folder, module="helpers.rl_rank")
        found[precision] = torch.load(folder / "found.pt", weights_only=False)
    assert {tensor.dtype for tensor in found["fp16"]["weights_after"].values()} == {torch.float16}
    for single, half in zip(found["fp32"]["metrics"], found["fp16"]["metrics"], strict=True):
        assert half["actor/grad_norm"] == pytest.approx(single["actor/grad_norm"], rel=0.05)
    before, after = found["fp16"]["weights"], found["fp16"]["weights_after"]
    assert all(not torch.equal(before[name], after[name]) for name in before if name.endswith("weight"))


def test_the_entropy_s_term_is_a_mean_over_tokens_whatever_the_micro_batch_size(
    server: engine.Server, corpus: engine.Corpus, tmp_path: Path
) -> None:
    """CISPO takes the mean over answers. The entropy and its gradient must not follow the cut into micro-batches."""
    numbers = torch.Generator().manual_seed(1)
    prompts = [torch.randint(40, 500, (n,), generator=numbers).tolist() for n in (5, 11, 8, 3)]
    found: dict[int, dict[str, Any]] = {}
    for size in (16, 4, 1):
        tree = rl_trees.tree(corpus, micro_batch_size=size)
        tree["rl_config"]["entropy_coeff"] = 10.0
        tree["minimind"]["algorithm"] = "cispo"
        task = {"tree": tree, "updates": 1}
        task |= {"batch": found[16]["batch"]} if found else {"prompts": prompts}
        folder = tmp_path / str(size)
        folder.mkdir()
        torch.save(task, folder / "task.pt")
        server.run(["--task", str(folder / "task.pt")], folder, module="helpers.rl_rank")
        found[size] = torch.load(folder / "found.pt", weights_only=False)
    mask = Batch(**found[16]["batch"]).mask.bool()
    expected = found[16]["before"]["entropy"][mask].double().mean().item()
    whole = found[16]["metrics"][0]
    for size, one in found.items():
        assert one["metrics"][0]["actor/entropy"] == pytest.approx(expected, rel=1e-5), size
        for key, value in whole.items():
            assert one["metrics"][0][key] == pytest.approx(value, rel=1e-4, abs=1e-6), (size, key)
