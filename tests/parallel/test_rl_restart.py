"""The driver begins anew: PPO's actor and critic as a pair, and a loss before the first step is one like others."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import engine
import rl_ray
import rl_trees

from minimind_mcore.training.checkpointing import iterations_in

SAME = ("grpo/score/mean", "actor/pg_loss", "actor/grad_norm", "critic/vf_loss", "critic/grad_norm")


def die_between() -> None:
    """Called in the run's process: it is killed when the critic of step 2 is saved, and the actor is not."""
    import rl_local

    save = rl_local.LocalTrain.save

    def dying(self: Any, iteration: int, *arguments: Any) -> None:
        if (self.role, iteration) == ("actor", 2):
            os._exit(9)
        save(self, iteration, *arguments)

    rl_local.LocalTrain.save = dying  # type: ignore[method-assign]


def test_a_run_killed_between_the_saves_goes_on_from_the_pair_before(
    server: engine.Server, corpus: engine.Corpus, tmp_path: Path
) -> None:
    prompts = rl_trees.write_prompts(tmp_path / "prompts")

    def run(name: str, **how: Any) -> engine.Run:
        tree = rl_trees.run_tree(corpus, prompts, tmp_path / name)
        tree["megatron_training"] |= {"train_iters": 2, "save_interval": 1}
        tree["rl_config"] |= {"adv_estimator": "gae", "critic_resource": {"num_npus": 1}}
        tree["minimind"] |= {"algorithm": "ppo", "keep_last": 1}
        tree["critic_config"] = {"model": "minimind3_tiny", "micro_batch_size": 4, "lr": 1e-3}
        (tmp_path / f"{name}.json").write_text(json.dumps(tree), encoding="utf-8")
        return server.run(["--tree", str(tmp_path / f"{name}.json")], tmp_path / name, module="rl_local", **how)

    run("calm")
    run("killed", hook=f"{__file__}:die_between", check=False)
    actor = tmp_path / "killed" / "checkpoints"
    critic = actor / "critic"  # it names no directory of its own
    assert iterations_in(actor) == [1] and iterations_in(critic) == [2, 1]
    assert "step 1 of 2 is done" in run("killed").output
    assert iterations_in(actor) == [2] and iterations_in(critic) == [2, 1]
    calm, killed = ({row["iteration"]: row for row in rl_ray.rows(tmp_path / name)} for name in ("calm", "killed"))
    assert [killed[2][name] for name in SAME] == [calm[2][name] for name in SAME]

    shutil.rmtree(critic / "iter_0000002")
    failed = run("killed", check=False)
    assert failed.codes != [0] and "no checkpoint of iteration 2, from which the actor goes on" in failed.output


def lose_a_rank_once() -> None:
    """Called in the run's process: a rank is lost while the weights to begin with are evaluated."""
    from minimind_mcore.rl.supervise import Lost
    from minimind_mcore.rl.trainer import Trainer

    evaluate, losses = Trainer.evaluate, [Lost(["actor rank 0"], "died")]

    def losing(self: Trainer) -> None:
        if losses:
            raise losses.pop()
        evaluate(self)

    Trainer.evaluate = losing  # type: ignore[method-assign]


def test_a_rank_lost_before_the_first_step_is_replaced(
    server: engine.Server, corpus: engine.Corpus, tmp_path: Path
) -> None:
    prompts = rl_trees.write_prompts(tmp_path / "prompts")
    tree = rl_trees.run_tree(corpus, prompts, tmp_path)
    tree["megatron_training"] |= {"train_iters": 1}
    tree["minimind"] |= {"eval_data": str(prompts), "eval_prompts": 4}
    (tmp_path / "tree.json").write_text(json.dumps(tree), encoding="utf-8")
    run = server.run(
        ["--tree", str(tmp_path / "tree.json")], tmp_path, module="rl_local", hook=f"{__file__}:lose_a_rank_once"
    )
    assert "training ranks: actor rank 0: died; replacing it (1 of 1)" in run.output
    measured = [row["iteration"] for row in engine.read_rows(tmp_path) if "eval/accuracy" in row]
    assert measured == [0, 1]
