"""Two hosts: a run of reinforcement learning spans both, equals that of one, and outlives the loss of a host."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from helpers import engine, rl_hosts, rl_ray, rl_trees

REFUSED = rl_hosts.why_no_namespaces()
STEPS, SAVED = 8, 2
PATIENCE = 180.0  # seconds to wait for anything
SAME = ("grpo/score/mean", "actor/pg_loss", "actor/kl_loss", "actor/grad_norm", "response_length/mean")


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[rl_hosts.Pair]:
    """Two hosts with a link; two nodes of this machine where it holds no others."""
    with rl_hosts.Pair(tmp_path, namespaces=not REFUSED) as pair:
        yield pair


@pytest.fixture
def cores() -> Iterator[list[int]]:
    """Two cores, or one twice, for hosts of their own; afterwards this process has all again."""
    usable = os.sched_getaffinity(0)
    yield [min(usable), max(usable)]
    os.sched_setaffinity(0, usable)


def configuration(
    corpus: engine.Corpus, folder: Path, name: str, rl: dict[str, object] | None = None, **ours: object
) -> str:
    """A YAML of a run of two ranks, wherever they are."""
    prompts = folder / "prompts"
    if not Path(f"{prompts}_packed_input_ids_document.idx").exists():
        rl_trees.write_prompts(prompts, 64)
    tree = rl_trees.run_tree(corpus, prompts, folder / name, micro_batch_size=4)
    tree["megatron_training"] |= {"train_iters": STEPS, "save_interval": SAVED}
    tree["rl_config"] |= {"verifier_function": ["helpers.rl_trees:unhurried"], **(rl or {})}
    tree["minimind"] |= {"cluster_wait_s": PATIENCE, "actor_timeout_s": PATIENCE, **ours}
    file = folder / f"{name}.yaml"
    file.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return str(file)


def start(pair: rl_hosts.Pair, config: str, cores: list[int] | None = None, **environment: str) -> None:
    """The head's script, then the worker's, each on its core if cores are given."""
    own = {"CONFIG": config, "MASTER_ADDR": pair.head.address, "MASTER_PORT": "6799", "NNODES": "2"}
    if cores:
        os.sched_setaffinity(0, cores[:1])
    pair.head.run("grpo_minimind_head.sh", **own, **environment)
    if cores:
        os.sched_setaffinity(0, cores[1:])
    join(pair, **environment)


def join(pair: rl_hosts.Pair, **environment: str) -> None:
    """The worker's script, once or again."""
    own = environment if pair.spaces else {"NODE_ADDR": pair.worker.address, **environment}
    pair.worker.run("grpo_minimind_worker.sh", MASTER_ADDR=pair.head.address, MASTER_PORT="6799", **own)


def steps(folder: Path) -> list[int]:
    """The steps that a run has logged."""
    return [row["iteration"] for row in rl_ray.rows(folder)] if (folder / "metrics.jsonl").exists() else []


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_run_on_two_hosts_equals_that_of_one_and_goes_on_when_a_lost_host_returns(
    corpus: engine.Corpus, tmp_path: Path, pair: rl_hosts.Pair
) -> None:
    alone = configuration(corpus, tmp_path, "alone")
    pair.head.run("grpo_minimind_single.sh", CONFIG=alone)
    assert pair.head.wait(PATIENCE) == 0, pair.head.said()
    start(pair, configuration(corpus, tmp_path, "both"))
    pair.until(lambda: 3 in steps(tmp_path / "both"), PATIENCE, "at the third step")
    pair.worker.lose()
    pair.until(
        lambda: f"a host was lost ({pair.worker.address})" in pair.head.said(), PATIENCE, "told of the lost host"
    )
    join(pair)
    assert pair.head.wait(PATIENCE) == 0, pair.head.said()
    assert pair.worker.wait(60) == 0 and "is gone: leaving" in pair.worker.said()
    said = pair.head.said()
    assert f"actor: rank 0 on {pair.head.address}; rank 1 on {pair.worker.address}" in said
    assert "training ranks: actor rank 1: died" in said
    found, expected = rl_ray.rows(tmp_path / "both"), {r["iteration"]: r for r in rl_ray.rows(tmp_path / "alone")}
    assert len(found) > STEPS and {row["iteration"] for row in found} == set(range(1, STEPS + 1))
    for row in found:
        for name in SAME:
            assert row[name] == pytest.approx(expected[row["iteration"]][name], abs=1e-4), (row["iteration"], name)
    last = [tmp_path / name / "checkpoints/latest_checkpointed_iteration.txt" for name in ("alone", "both")]
    assert [file.read_text().strip() for file in last] == [str(STEPS)] * 2


def noted(file: Path) -> list[tuple[str, set[int]]]:
    """Which host generated which responses, call by call: its address, and the seeds of the responses."""
    lines = [line.split() for line in file.read_text(encoding="utf-8").splitlines()]
    return [(address, {int(seed) for seed in seeds}) for address, *seeds in lines]


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_engines_on_two_hosts_generate_what_two_engines_on_one_host_do(
    corpus: engine.Corpus, tmp_path: Path, pair: rl_hosts.Pair, cores: list[int]
) -> None:
    """Two ranks and two engines; a host has three CPUs, so that each gets an engine. The engines are a step ahead.

    Every process has one thread, because arithmetic depends on their number: on one host two cores for two engines, on
    two hosts a core for each host.
    """
    rl = {"blocking": False, "actor_resource": {"num_npus": 2}}
    engines = {"rollout_resource": {"num_npus": 2}, "rollout_function": "helpers.rl_hosts:noted"}
    alone = configuration(corpus, tmp_path, "alone", rl, **engines)
    both = configuration(corpus, tmp_path, "both", rl, **engines)
    pair.head.run("grpo_minimind_single.sh", CONFIG=alone, NUM_CPUS="4", ROLLOUTS_NOTED=str(tmp_path / "alone.txt"))
    assert pair.head.wait(3 * PATIENCE) == 0, pair.head.said()
    start(pair, both, cores, NUM_CPUS="3", ROLLOUTS_NOTED=str(tmp_path / "both.txt"))
    assert pair.head.wait(3 * PATIENCE) == 0, pair.head.said()
    assert re.search(r"rollout engines: rank 0 on \S+; rank 1 on \S+", pair.head.said())
    seeds = set().union(*(some for _, some in noted(tmp_path / "alone.txt")))
    assert len(seeds) == STEPS * rl_trees.STEP
    by_host = {host.address: set[int]() for host in (pair.head, pair.worker)}
    for address, some in noted(tmp_path / "both.txt"):
        by_host[address] |= some
    assert set.union(*by_host.values()) == seeds
    assert {len(some) for some in by_host.values()} == {len(seeds) // 2}  # each engine has a half of every step
    found, expected = rl_ray.rows(tmp_path / "both"), {r["iteration"]: r for r in rl_ray.rows(tmp_path / "alone")}
    assert {row["iteration"] for row in found} == set(range(1, STEPS + 1))
    for row in found:
        assert [row[name] for name in SAME] == [expected[row["iteration"]][name] for name in SAME], row["iteration"]
    models = [
        engine.load(tmp_path / name / f"checkpoints/iter_{STEPS:07d}/mp_rank_00/model_optim_rng.pt")["model"]
        for name in ("alone", "both")
    ]
    assert engine.same(*models)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("how", ["lost", "cut"])
def test_a_host_that_does_not_return_ends_the_run_by_a_deadline(
    corpus: engine.Corpus, tmp_path: Path, pair: rl_hosts.Pair, how: str
) -> None:
    if how == "cut" and REFUSED:
        pytest.skip(REFUSED)
    start(pair, configuration(corpus, tmp_path, "run", cluster_wait_s=90.0))
    pair.until(lambda: 3 in steps(tmp_path / "run"), PATIENCE, "at the third step")
    if how == "cut":
        pair.cut()
    else:
        pair.worker.lose()
    assert pair.head.wait(PATIENCE) == 1, pair.head.said()
    (error,) = [line for line in pair.head.said().splitlines() if line.startswith("error: ")]
    assert f"a host was lost ({pair.worker.address})" in error and "the same command resumes" in error


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_host_that_does_not_come_is_named_by_a_deadline(
    corpus: engine.Corpus, tmp_path: Path, pair: rl_hosts.Pair
) -> None:
    config = configuration(corpus, tmp_path, "run")
    pair.head.run(
        "grpo_minimind_head.sh", CONFIG=config, MASTER_ADDR=pair.head.address, NNODES="2", WAIT_SECONDS="15"
    )  # fmt: skip
    assert pair.head.wait(120) == 1
    assert f"after 15 s: 1 of 2 hosts are there: {pair.head.address} (1 CPU)" in pair.head.said()
    pair.worker.run("grpo_minimind_worker.sh", MASTER_ADDR=pair.head.address, WAIT_SECONDS="5")
    assert pair.worker.wait(60) == 1
    assert f"no Ray head at {pair.head.address}:6766 yet" in pair.worker.said()


@pytest.mark.skipif(bool(REFUSED), reason=REFUSED or "-")
@pytest.mark.slow
@pytest.mark.timeout(400)
def test_gradients_go_over_the_link(corpus: engine.Corpus, tmp_path: Path, pair: rl_hosts.Pair) -> None:
    start(pair, configuration(corpus, tmp_path, "run"))
    pair.until(lambda: 2 in steps(tmp_path / "run"), PATIENCE, "at the second step")
    before = pair.crossed()
    pair.until(lambda: 6 in steps(tmp_path / "run"), PATIENCE, "at the sixth step")
    # fp32 gradients of 0.5M parameters and more, half of them for this rank, in each of four steps
    assert pair.crossed() - before > 4 * 0.5 * 4 * 500_000
