"""Actors of the Ray trainer are killed: the run completes, and as if nothing had happened."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from helpers import engine, rl_ray, rl_trees

DEADLINE = 420.0  # seconds for both runs; they take about 60 on two idle cores
SAME = ("grpo/score/mean", "actor/pg_loss", "actor/kl_loss", "actor/grad_norm", "response_length/mean", "actor/lr")


@pytest.mark.timeout(DEADLINE + 30)
def test_killed_actors_are_replaced_and_a_killed_rank_goes_on_from_the_checkpoint(
    corpus: engine.Corpus, tmp_path: Path
) -> None:
    prompts = rl_trees.write_prompts(tmp_path / "prompts")
    trees = {name: rl_trees.run_tree(corpus, prompts, tmp_path / name) for name in ("calm", "chaos")}
    kills = {"1": ["rollout@rollout", "manager@logprob"], "2": ["reward@reward"], "4": ["actor@logprob"]}
    kills["3"] = ["rollout@rollout", "manager@reward"]
    trees["chaos"]["minimind"]["max_restarts"] = 1  # of a kind, until the next step is done
    output = rl_ray.run(
        tmp_path, [{"name": "calm", "tree": trees["calm"]}, {"name": "chaos", "tree": trees["chaos"], "kills": kills}],
        DEADLINE,
    )  # fmt: skip
    for kind in (
        "rollout manager: rollout manager",
        "rollout actors: rollout 0",
        "reward actors: reward 0",
        "training ranks: actor rank 0",
    ):
        assert f"{kind}: died" in output
    calm, chaos = (rl_ray.rows(tmp_path / name) for name in trees)
    assert [row["iteration"] for row in chaos] == [1, 2, 3, 3, 4]  # the third once more, after the checkpoint of 2
    expected = {row["iteration"]: [row[name] for name in SAME] for row in calm}
    assert all([row[name] for name in SAME] == expected[row["iteration"]] for row in chaos)
    assert calm[0]["actor/grad_norm"] > 0 and calm[-1]["rollout/logp_diff"] < 1e-4
    files = [tmp_path / name / "checkpoints/iter_0000004/mp_rank_00/model_optim_rng.pt" for name in trees]
    states = [engine.load(file) for file in files]
    assert states[0].keys() == states[1].keys()
    for key in states[0]:
        assert engine.same(states[0][key], states[1][key]), key
    assert states[0]["args"].rl_state == states[1]["args"].rl_state
    assert states[0]["args"].rl_state["consumed"] == 16


PHASES = ("rollout", "reward", "logprob", "update", "sync", "save")
GRID = {"grpo": ("rollout", "reward", "actor", "manager"), "apart": ("reference",), "ppo": ("critic", "manager")}


def grid_trees(corpus: engine.Corpus, prompts: Path, folder: Path, run: str, names: list[str]) -> dict[str, Any]:
    """Configurations of `run`, one for each name: enough steps for a kill in each phase, saved after every second."""
    trees = {}
    for name in names:
        tree = trees[name] = rl_trees.run_tree(corpus, prompts, folder / name)
        tree["megatron_training"] |= {"train_iters": 2 * len(PHASES), "save_interval": 2}
        tree["minimind"] |= {"max_restarts": 2 * len(PHASES), "actor_timeout_s": 200.0, "cluster_wait_s": 200.0}
        if run == "apart":
            tree["rl_config"] |= {"use_integrated_worker": False, "reference_resource": {"num_npus": 1}}
            tree["ref_config"] = {"model": "minimind3_tiny", "micro_batch_size": 4}
        if run == "ppo":
            tree["rl_config"] |= {"adv_estimator": "gae"}
            tree["minimind"] |= {"algorithm": "ppo"}
    return trees


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("run", GRID)
def test_every_kind_of_actor_is_killed_in_every_phase(corpus: engine.Corpus, tmp_path: Path, run: str) -> None:
    prompts = rl_trees.write_prompts(tmp_path / "prompts", 96)
    trees = grid_trees(corpus, prompts, tmp_path, run, ["calm", *GRID[run]])
    tasks = [{"name": "calm", "tree": trees["calm"]}]
    for kind in GRID[run]:
        # at even steps: saving is a phase of these alone
        kills = {str(2 * (i + 1)): [f"{kind}@{phase}"] for i, phase in enumerate(PHASES)}
        tasks.append({"name": kind, "tree": trees[kind], "kills": kills})
    rl_ray.run(tmp_path, tasks, 1700.0)
    expected = {row["iteration"]: row for row in rl_ray.rows(tmp_path / "calm")}
    for kind in GRID[run]:
        found = {row["iteration"]: row for row in rl_ray.rows(tmp_path / kind)}
        assert found.keys() == expected.keys()
        for step, row in found.items():
            same = [name for name in SAME if name in row]
            assert [row[name] for name in same] == [expected[step][name] for name in same], (kind, step)
        files = [
            tmp_path / name / f"checkpoints/iter_{2 * len(PHASES):07d}/mp_rank_00/model_optim_rng.pt"
            for name in ("calm", kind)
        ]
        calm, killed = (engine.load(file) for file in files)
        assert engine.same(calm["model"], killed["model"]) and engine.same(calm["optimizer"], killed["optimizer"])
