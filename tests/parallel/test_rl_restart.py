"""The driver begins anew: PPO's actor and critic as a pair, and a loss before the first step is one like others."""

from __future__ import annotations

import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from helpers import engine, rl_ray, rl_trees

from minimind_mcore.checkpoint.files import iterations_in
from minimind_mcore.rl.config.load import compose, plain

SAME = ("grpo/score/mean", "actor/pg_loss", "actor/grad_norm", "critic/vf_loss", "critic/grad_norm")


def die_between() -> None:
    """Called in the run's process: it is killed when the critic of step 2 is saved, and the actor is not."""
    from helpers import rl_local

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
        return server.run(["--tree", str(tmp_path / f"{name}.json")], tmp_path / name, module="helpers.rl_local", **how)

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
    assert failed.codes != [0] and "no checkpoint of iteration 2, from which the actor resumes" in failed.output


def lose_a_rank_once() -> None:
    """Called in the run's process: a rank is lost while the weights to begin with are evaluated."""
    from minimind_mcore.rl.runtime.supervise import Lost
    from minimind_mcore.rl.runtime.trainer import Trainer

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
        ["--tree", str(tmp_path / "tree.json")],
        tmp_path,
        module="helpers.rl_local",
        hook=f"{__file__}:lose_a_rank_once",
    )
    assert "training ranks: actor rank 0: died; replacing it (1 of 1)" in run.output
    measured = [row["iteration"] for row in engine.read_rows(tmp_path) if "eval/accuracy" in row]
    assert measured == [0, 1]


SHIPPED = ("grpo_minimind3", "ppo_minimind3", "dapo_minimind3")


def shipped_tree(corpus: engine.Corpus, name: str, folder: Path) -> dict[str, Any]:
    """A configuration that the kit ships, shrunk to a model and batches of a test; every other key stays."""
    tree = plain(compose(name, device="cpu"))
    small = rl_trees.run_tree(corpus, folder.parent / "prompts", folder)
    (model,) = tree["model"]
    tree["model"][model] = small["model"]["minimind3_tiny"]
    tree["megatron_training"] |= {
        **{key: small["megatron_training"][key] for key in ("global_batch_size", "seq_length", "data_path")},
        **{key: small["megatron_training"][key] for key in ("tokenizer_name_or_path", "train_iters", "save_interval")},
        "dataset_additional_keys": ["labels"],
    }
    for section in ("actor_config", "critic_config"):
        if section in tree:  # large steps show a lost moment; the directories differ by run
            where = {"load": None, "save": str(folder / section)}
            tree[section] |= {"micro_batch_size": 4, "lr": 1e-3, "min_lr": 1e-4, **where}
    tree["rl_config"] |= {
        "n_samples_per_prompt": rl_trees.N, "mini_batch_size": 4, "actor_resource": {"num_npus": 1},
        "max_prompt_length": 32, "actor_forward_micro_batch_size": 4, "ref_forward_micro_batch_size": 4,
        "verifier_function": ["helpers.rl_trees:rewarded"],
    }  # fmt: skip
    tree["generate_config"]["sampling_config"]["max_tokens"] = 8
    tree["minimind"]["output_dir"] = str(folder)
    return tree


def lose_a_rank_at_step_3() -> None:
    """Called in the run's process: a rank is lost in the third step, after the checkpoint of the second."""
    from minimind_mcore.rl.runtime.supervise import Lost
    from minimind_mcore.rl.runtime.trainer import Trainer

    generate, losses = Trainer.generate, [Lost(["actor rank 0"], "died")]

    def losing(self: Trainer) -> Any:
        if self.done + 1 == 3 and losses:
            raise losses.pop()
        return generate(self)

    Trainer.generate = losing  # type: ignore[method-assign]


@pytest.mark.parametrize("name", SHIPPED)
def test_resume_and_recovery_of_a_shipped_configuration_equal_the_undisturbed_run(
    server: engine.Server, corpus: engine.Corpus, tmp_path: Path, name: str
) -> None:
    rl_trees.write_prompts(tmp_path / "prompts")

    def run(kind: str, hook: str | None = None) -> dict[int, dict[str, Any]]:
        tree = shipped_tree(corpus, name, tmp_path / kind)
        assert tree["actor_config"]["no_load_optim"] and tree["actor_config"]["no_load_rng"]
        (tmp_path / f"{kind}.json").write_text(json.dumps(tree), encoding="utf-8")
        server.run(["--tree", str(tmp_path / f"{kind}.json")], tmp_path / kind, module="helpers.rl_local", hook=hook)
        return {row["iteration"]: row for row in rl_ray.rows(tmp_path / kind)}

    calm = run("calm")
    assert calm.keys() == {1, 2, 3, 4} and calm[4]["actor/lr"] < calm[3]["actor/lr"]
    sections = ["actor_config", *(["critic_config"] if name.startswith("ppo") else [])]
    for section in sections:
        shutil.copytree(tmp_path / "calm" / section, tmp_path / "resumed" / section)
        shutil.rmtree(tmp_path / "resumed" / section / "iter_0000004")
        (tmp_path / "resumed" / section / engine.TRACKER).write_text("2")
    found = {"resumed": run("resumed"), "recovered": run("recovered", f"{__file__}:lose_a_rank_at_step_3")}
    for kind, rows in found.items():
        assert rows.keys() >= {3, 4}, kind
        for step in (3, 4):
            same = [key for key in (*SAME, "actor/lr", "critic/lr") if key in calm[step]]
            assert [rows[step][key] for key in same] == [calm[step][key] for key in same], (kind, step)
        for section in sections:
            file = f"{section}/iter_0000004/mp_rank_00/model_optim_rng.pt"
            assert engine.same(engine.load(tmp_path / kind / file), engine.load(tmp_path / "calm" / file)), kind


def test_a_longer_schedule_is_a_choice(server: engine.Server, corpus: engine.Corpus, tmp_path: Path) -> None:
    rl_trees.write_prompts(tmp_path / "prompts")

    def run(steps: int, **ours: Any) -> engine.Run:
        tree = shipped_tree(corpus, "grpo_minimind3", tmp_path / "run")
        tree["megatron_training"]["train_iters"] = steps
        tree["minimind"] |= ours
        (tmp_path / "tree.json").write_text(json.dumps(tree), encoding="utf-8")
        return server.run(
            ["--tree", str(tmp_path / "tree.json")], tmp_path / "run", module="helpers.rl_local", check=False
        )

    assert run(2).codes == [0]
    refused = run(4)
    assert refused.codes == [1] and "minimind.resume_schedule: override or checkpoint" in refused.output
    assert run(4, resume_schedule="override").codes == [0]
    rates = [row["actor/lr"] for row in rl_ray.rows(tmp_path / "run")]
    assert rates == pytest.approx([1e-3, 5.5e-4, 5.5e-4, 1e-4 + 9e-4 * (1 + math.cos(math.pi * 3 / 4)) / 2])


def test_another_order_of_prompts_is_one_warning_with_both_values(
    server: engine.Server, corpus: engine.Corpus, tmp_path: Path
) -> None:
    prompts, others = rl_trees.write_prompts(tmp_path / "prompts"), rl_trees.write_prompts(tmp_path / "others", 16)

    def run(steps: int, **changes: Any) -> str:
        tree = rl_trees.run_tree(corpus, prompts, tmp_path / "run")
        tree["megatron_training"] |= {"train_iters": steps, "save_interval": 1, **changes}
        tree["minimind"]["resume_schedule"] = "override"
        (tmp_path / "tree.json").write_text(json.dumps(tree), encoding="utf-8")
        path = str(tmp_path / "tree.json")
        return server.run(["--tree", path], tmp_path / "run", module="helpers.rl_local").output

    said = "reads its samples in another order"
    assert said not in run(1) and said not in run(2)
    output = run(3, seed=8)
    assert output.count(said) == 1 and "seed is 3 there and 8 here" in output, output
    output = run(4, seed=8, data_path=str(others))
    assert output.count(said) == 1 and "the digest of data_path is" in output, output
