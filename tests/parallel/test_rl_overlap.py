"""`rl_config.blocking: false` on Ray: the engines generate the next step during the update, shown by events."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers import engine, rl_ray, rl_trees


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_the_next_step_is_generated_between_the_beginning_and_the_end_of_an_update(
    corpus: engine.Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Generation waits for the beginning of the update, and the update for the end of the generation."""
    events = tmp_path / "events"
    events.mkdir()
    monkeypatch.setenv("RL_EVENTS", str(events))
    tree = rl_trees.run_tree(corpus, rl_trees.write_prompts(tmp_path / "prompts"), tmp_path / "run")
    tree["rl_config"] |= {"blocking": False, "init_kl_coef": 0, "entropy_coeff": 0}
    tree["minimind"] |= {
        "rollout_resource": {"num_npus": 1}, "rollout_function": "helpers.rl_trees:within_the_update",
        "policy_loss": "helpers.rl_trees:around_the_rollout", "actor_timeout_s": 120.0,
    }  # fmt: skip
    rl_ray.run(tmp_path, [{"name": "run", "tree": tree}], 360.0)
    rows = rl_ray.rows(tmp_path / "run")
    assert [row["iteration"] for row in rows] == [1, 2, 3, 4]
    names = {f"{kind}-{step}" for kind in ("generated", "updating") for step in (1, 2, 3, 4)}
    assert {file.name for file in events.iterdir()} == names
    # The responses are of the weights before the update.
    assert rows[0]["rollout/logp_diff"] < 1e-4 < rows[1]["rollout/logp_diff"]
    assert all(row["rollout/logp_diff_same_weights"] < 1e-4 for row in rows)
