"""Actors of the Ray trainer are killed: the run completes, and as if nothing had happened."""

from __future__ import annotations

from pathlib import Path

import engine
import pytest
import rl_ray
import rl_trees

DEADLINE = 240.0  # seconds for both runs; they take about 60 on two cores
SAME = ("grpo/score/mean", "actor/pg_loss", "actor/kl_loss", "actor/grad_norm", "response_length/mean", "actor/lr")


@pytest.mark.timeout(DEADLINE + 30)
def test_killed_actors_are_replaced_and_a_killed_rank_goes_on_from_the_checkpoint(
    corpus: engine.Corpus, tmp_path: Path
) -> None:
    prompts = rl_trees.write_prompts(tmp_path / "prompts")
    trees = {name: rl_trees.run_tree(corpus, prompts, tmp_path / name) for name in ("calm", "chaos")}
    kills = {"1": ["rollout"], "2": ["reward"], "4": ["actor"]}
    output = rl_ray.run(
        tmp_path, [{"name": "calm", "tree": trees["calm"]}, {"name": "chaos", "tree": trees["chaos"], "kills": kills}],
        DEADLINE,
    )  # fmt: skip
    for kind in ("rollout actors: rollout 0", "reward actors: reward 0", "training ranks: actor rank 0"):
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
