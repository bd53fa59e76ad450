"""The rollout manager without Ray: what engines are asked, what ranks get, and what a user may replace."""

from __future__ import annotations

import dataclasses
import random
import threading
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from helpers import rl_trees
from helpers.engine import Corpus

from minimind_mcore.errors import UserError
from minimind_mcore.models.presets import PRESETS
from minimind_mcore.models.weights import mcore_shapes
from minimind_mcore.rl.algorithms.batches import mini_batches
from minimind_mcore.rl.config.load import resolve
from minimind_mcore.rl.runtime import batch as batches
from minimind_mcore.rl.runtime import supervise, user_function
from minimind_mcore.rl.runtime.engines.protocol import Response, RolloutSamplingParams
from minimind_mcore.rl.runtime.rollouts import Position
from minimind_mcore.rl.runtime.sharding import Budget, Division, measured, trained
from minimind_mcore.rl.runtime.trajectory import Trajectory
from minimind_mcore.rl.runtime.workers import rollout
from minimind_mcore.rl.runtime.workers.manager import ManagerWorker

STOP = 2


class Writers:
    """Engines whose responses depend on the seed alone; counts their calls."""

    def __init__(self, count: int = 2, longest: int = 11) -> None:
        self.count, self.longest = count, longest
        self.calls: list[tuple[list[list[int]], int, RolloutSamplingParams, list[int]]] = []

    def __len__(self) -> int:
        return self.count

    def run(self, method: str, parts: Sequence[tuple[Any, ...]]) -> list[Any]:
        assert method == "generate"
        self.calls += parts
        return [[self.response(sampling, seed) for seed in seeds] for _, _, sampling, seeds in parts]

    def response(self, sampling: RolloutSamplingParams, seed: int) -> Response:
        numbers = random.Random(seed)
        length = numbers.randint(1, self.longest)
        ids = [numbers.randrange(40, 90) for _ in range(min(length, sampling.max_tokens))]
        finished = length <= sampling.max_tokens
        ids[-1] = STOP if finished else ids[-1]
        return Response(np.array(ids, np.int32), np.full(len(ids), -0.5, np.float32), finished)


class Judge:
    """Scores even rows of each prompt's responses with 1."""

    def __len__(self) -> int:
        return 2

    def run(self, method: str, parts: Sequence[tuple[Any, ...]]) -> list[Any]:
        from minimind_mcore.rl.rewards.rewards import Scores

        found = [torch.tensor([float(len(text)) for text in part[0]]) for part in parts]
        return [Scores(scores, {"helpers.rl_trees:rewarded": scores}) for scores in found]


def manager_of(corpus: Corpus, folder: Path, writers: Writers, **sections: dict[str, Any]) -> ManagerWorker:
    tree = rl_trees.run_tree(corpus, rl_trees.write_prompts(folder / "prompts"), folder / "run")
    for name, section in sections.items():
        tree[name] |= section
    worker = ManagerWorker(resolve(tree), writers, Judge())
    worker.prepare(Position(), {})
    return worker


def test_each_engine_gets_a_share_or_what_fits_into_a_batch(corpus: Corpus, tmp_path: Path) -> None:
    writers = Writers(2)
    worker = manager_of(corpus, tmp_path, writers)  # four prompts with four responses, sixteen at a time
    worker.generate(1, 0)
    assert [len(prompts) for prompts, *_ in writers.calls] == [2, 2]
    small = Writers(2)
    manager_of(corpus, tmp_path, small, generate_config={"max_num_seqs": 4}).generate(1, 0)
    lengths = [len(prompt) for prompts, *_ in small.calls for prompt in prompts]
    assert len(small.calls) == 4 and lengths == sorted(lengths)
    seeds = sorted(seed for *_, seeds in small.calls for seed in seeds)
    assert seeds == [(3 << 64) + number for number in range(16)]  # of the whole step, whoever generates


def test_a_long_response_goes_on_where_it_stopped_and_its_prompt_is_carried(corpus: Corpus, tmp_path: Path) -> None:
    writers = Writers(1, longest=3)
    worker = manager_of(corpus, tmp_path, writers, rl_config={"partial_rollout_max_split": 4})
    for step in (1, 2, 3):
        assert worker.generate(step, 0) == 16
        batch = worker.experience.batch
        assert ((batch.policy_lengths == 8) | batch.finished).all()
    contexts = {tuple(prompt) for prompts, *_ in writers.calls for prompt in prompts}
    continued = [call for call in writers.calls if min(call[3]) >> 48 & 0xFFFF]
    assert continued and all(sampling.max_tokens == 2 for _, _, sampling, _ in writers.calls)
    assert len(contexts) > 12
    worker.rewards()
    state = worker.compute_advantages(3, True).state
    assert state["consumed"] == worker.experience.consumed and state["consumed"] - len(state["carried"]) == 12
    again = manager_of(corpus, tmp_path, Writers(1), rl_config={"partial_rollout_max_split": 4})
    again.go_to(Position(state["consumed"], tuple(state["carried"])), {})
    assert again.manager.position == Position(state["consumed"], tuple(state["carried"]))


def twice(trajectories: Sequence[Trajectory], engines: Any, sampling: RolloutSamplingParams) -> None:
    """Two turns with an environment's tokens between."""
    engines.generate(trajectories, sampling)
    for trajectory in trajectories:
        trajectory.append_observation(np.array([91, 92], np.int32))
    engines.generate(trajectories, sampling)


def longest(rewards: torch.Tensor, scores: Any, n: int) -> torch.Tensor:
    """Every second group."""
    return torch.arange(len(rewards) // n) % 2 == 0


def test_generation_and_the_choice_of_groups_can_be_replaced(corpus: Corpus, tmp_path: Path) -> None:
    path = "unit.test_rl_manager" if __name__.startswith("unit.") else __name__
    own = {"rollout_function": f"{path}:twice", "rollout_filter": f"{path}:longest"}
    more = {"filter_groups_max_batches": 3}
    worker = manager_of(corpus, tmp_path, Writers(2), minimind=own, rl_config=more)
    worker.generate(1, 0)
    batch = worker.experience.batch
    assert worker.experience.metrics["train/num_gen_batches"] == 2
    assert worker.experience.metrics["group/dropped/filtered"] == 4
    heard = (batch.responses == 91) | (batch.responses == 92)
    inside = torch.arange(batch.width) < batch.response_lengths[:, None]
    assert (heard & inside).sum() == 2 * len(batch)
    assert ((batch.mask == 0) & inside).equal(heard & inside)


def only_the_first(rewards: torch.Tensor, scores: Any, n: int) -> torch.Tensor:
    """The first group of each batch."""
    return torch.arange(len(rewards) // n) == 0


def of_responses(rewards: torch.Tensor, scores: Any, n: int) -> torch.Tensor:
    """Wrong: one value for each response."""
    return rewards > 0


@pytest.mark.parametrize(
    ("function", "says"),
    [
        ("only_the_first", r"kept 2 of 8 groups after 2 batches; expected global_batch_size 4"),
        ("of_responses", r"returned the shape \(16,\), expected \(4,\)"),
    ],
)
def test_groups_that_a_filter_rejects_are_not_trained_on(
    function: str, says: str, corpus: Corpus, tmp_path: Path
) -> None:
    path = "unit.test_rl_manager" if __name__.startswith("unit.") else __name__
    own, more = {"rollout_filter": f"{path}:{function}"}, {"filter_groups_max_batches": 2}
    worker = manager_of(corpus, tmp_path, Writers(1), minimind=own, rl_config=more)
    with pytest.raises(UserError, match=f"minimind.rollout_filter: {path}:{function} {says}"):
        worker.generate(1, 0)


def numbers_of(calls: Sequence[tuple[list[list[int]], int, RolloutSamplingParams, list[int]]]) -> list[int]:
    """Which prompts the calls of an engine were for."""
    return sorted({(seed - (3 << 64)) // 4 for *_, seeds in calls for seed in seeds})


def test_carried_prompts_are_trained_on_where_a_call_generates_whole_responses(corpus: Corpus, tmp_path: Path) -> None:
    """The checkpoint of a run with partial rollouts carries five prompts; the run goes on without partial rollouts."""
    writers = Writers(1)
    worker = manager_of(corpus, tmp_path, writers)
    worker.go_to(Position(9, (2, 5, 6, 7, 8)), {})
    for step, expected in ((1, [2, 5, 6, 7]), (2, [8, 9, 10, 11]), (3, [12, 13, 14, 15])):
        writers.calls.clear()
        assert worker.generate(step, 0) == 16
        assert numbers_of(writers.calls) == expected
    assert worker.manager.position == Position(16, ())


def much(trajectories: Sequence[Trajectory], engines: Any, sampling: RolloutSamplingParams) -> None:
    """The environment says so much to every second response that 3 tokens are left, and to all that fit again more."""
    engines.generate(trajectories, sampling)
    for trajectory in trajectories[::2]:
        trajectory.append_observation(np.full(engines.remaining_tokens(trajectory) - 3, 91, np.int32))
    engines.generate(trajectories, sampling)
    for trajectory in trajectories:
        trajectory.append_observation(np.full(max(0, engines.remaining_tokens(trajectory)), 92, np.int32))


def too_much(trajectories: Sequence[Trajectory], engines: Any, sampling: RolloutSamplingParams) -> None:
    """More than seq_length has room for."""
    engines.generate(trajectories, sampling)
    trajectories[5].append_observation(np.full(64, 91, np.int32))


def test_a_response_ends_where_the_sequence_does_and_cuts_no_other(corpus: Corpus, tmp_path: Path) -> None:
    path = "unit.test_rl_manager" if __name__.startswith("unit.") else __name__
    writers = Writers(1, longest=8)
    worker = manager_of(corpus, tmp_path / "much", writers, minimind={"rollout_function": f"{path}:much"})
    worker.generate(1, 0)
    batch = worker.experience.batch
    assert batch.lengths.tolist() == [64] * 16

    def length(row: int, segment: int) -> int:
        return len(writers.response(worker.manager.sampling, (3 << 64) + row + (segment << 48)).ids)

    second = [length(row, 1) if row % 2 else min(3, length(row, 2)) for row in range(16)]
    assert batch.policy_lengths.tolist() == [length(row, 0) + more for row, more in enumerate(second)]
    assert max(second[1::2]) > 3 and max(length(row, 2) for row in range(0, 16, 2)) > 3
    worker = manager_of(corpus, tmp_path / "too", Writers(1), minimind={"rollout_function": f"{path}:too_much"})
    with pytest.raises(UserError, match=r"a prompt and its response have \d+ tokens; expected at most 64"):
        worker.generate(1, 0)


class Hours(Writers):
    """Engines that take an hour for each call, of a clock that only they and `Silent` advance."""

    now = 0.0

    def run(self, method: str, parts: Sequence[tuple[Any, ...]]) -> list[Any]:
        Hours.now += 3600
        return super().run(method, parts)


class Silent(threading.Event):
    """An environment that does not answer: the limit passes while a function waits for it."""

    def wait(self, timeout: float | None = None) -> bool:
        Hours.now += 61
        return super().wait(timeout)


released = Silent()


def hangs(trajectories: Sequence[Trajectory], engines: Any, sampling: RolloutSamplingParams) -> None:
    """Waits for an environment after two calls of the engines."""
    twice(trajectories, engines, sampling)
    released.wait()


def hanging_filter(rewards: torch.Tensor, scores: Any, n: int) -> torch.Tensor:
    """Waits for an environment."""
    released.wait()
    return longest(rewards, scores, n)


def test_a_function_that_waits_forever_ends_the_run_and_slow_engines_do_not(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(user_function, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(user_function, "time", SimpleNamespace(monotonic=lambda: Hours.now))
    path = "unit.test_rl_manager" if __name__.startswith("unit.") else __name__

    def of(**own: str) -> ManagerWorker:
        folder, functions = tmp_path / str(own), {name: f"{path}:{function}" for name, function in own.items()}
        folder.mkdir()
        return manager_of(corpus, folder, Hours(1), minimind=functions, rl_config={"filter_groups_max_batches": 3})

    assert of(rollout_function="twice").generate(1, 0) == 16  # two hours in the engines, of a limit of a minute
    for key, function in (("rollout_function", "hangs"), ("rollout_filter", "hanging_filter")):
        says = (
            rf"minimind.{key}: {path}:{function} has neither returned nor called the engines for 60 s, the limit of "
            rf"minimind.actor_timeout_s. It is at [^ ]*test_rl_manager.py:\d+ released.wait\(\) > "
        )
        with pytest.raises(UserError, match=says):
            of(**{key: function}).generate(1, 0)
    released.set()


def test_held_out_responses_depend_on_the_run_s_seed_and_share_none_with_training(
    corpus: Corpus, tmp_path: Path
) -> None:
    seen: list[set[int]] = []
    for seed in (3, 4):
        writers = Writers(1)
        worker = manager_of(corpus, tmp_path / str(seed), writers, megatron_training={"seed": seed})
        worker.manager.generate()
        seen.append({one for *_, seeds in writers.calls for one in seeds})
        writers.calls.clear()
        worker.manager.evaluate(worker.manager.prompts, 4, 4)
        seen.append({one for *_, seeds in writers.calls for one in seeds})
    assert all(seen) and len(set.union(*seen)) == sum(map(len, seen))


def test_steps_ahead_are_begun_and_a_pause_waits_for_them(corpus: Corpus, tmp_path: Path) -> None:
    writers = Writers(1)
    worker = manager_of(corpus, tmp_path, writers)
    worker.generate(1, 2)
    worker.pause()
    assert 1 <= len(writers.calls) <= 3
    worker.generate(2, 2)
    assert worker.experience.consumed == 8
    worker.go_to(Position(4), {})  # what was begun is dropped
    worker.generate(2, 0)
    assert worker.experience.consumed == 8


class Gated(Writers):
    """Engines whose second call waits."""

    def __init__(self) -> None:
        super().__init__(1)
        self.entered, self.open = threading.Event(), threading.Event()

    def run(self, method: str, parts: Sequence[tuple[Any, ...]]) -> list[Any]:
        found = super().run(method, parts)
        if len(self.calls) == 2:
            self.entered.set()
            assert self.open.wait(60)
        return found


def test_a_step_is_handed_out_while_the_next_one_is_generated(corpus: Corpus, tmp_path: Path) -> None:
    writers = Gated()
    worker = manager_of(corpus, tmp_path, writers, rl_config={"blocking": False})
    assert worker.generate(1, 1) == 16
    assert writers.entered.wait(60)
    worker.rewards()
    worker.compute_advantages(1, True)
    [_, shard] = worker.shards(Division(1, 1, 4, 4, 4, "token-mean", 1), 1)
    assert shard is not None and len(shard.batch) == 16
    assert worker.begun[0].running()
    writers.open.set()
    assert worker.generate(2, 0) == 16 and worker.experience.consumed == 8


class Mortals(Writers):
    """Engines that all die at one call, and are replaced."""

    def __init__(self, dies: int) -> None:
        super().__init__(1)
        self.dies = dies

    def run(self, method: str, parts: Sequence[tuple[Any, ...]]) -> list[Any]:
        self.dies -= 1
        if self.dies == 0:
            raise supervise.WorkersLost(method)
        return super().run(method, parts)


@pytest.mark.parametrize("ahead", [0, 1, 2])
def test_a_step_that_failed_is_done_again_with_its_own_prompts(corpus: Corpus, tmp_path: Path, ahead: int) -> None:
    def steps(dies: int) -> list[tuple[int, Any]]:
        worker = manager_of(corpus, tmp_path, Mortals(dies))
        found, failures = [], 0
        for step in range(1, 6):
            while not (answer := worker.ask("generate", step, min(ahead, 5 - step))).complete:
                failures += 1
            assert answer.value == 16
            found.append((worker.experience.consumed, worker.experience.batch.responses.tolist()))
            for begun in list(worker.begun):
                begun.exception()  # the engines are at their worst when nobody waits for them
        assert failures == (dies > 0)
        return found

    calm = steps(0)
    assert [consumed for consumed, _ in calm] == [4, 8, 12, 16, 20]
    for dies in range(1, 6):
        assert steps(dies) == calm, dies


def test_an_actor_that_a_thread_loses_meanwhile_stays_lost(corpus: Corpus, tmp_path: Path) -> None:
    tree = rl_trees.run_tree(corpus, rl_trees.write_prompts(tmp_path / "prompts"), tmp_path / "run")
    worker = ManagerWorker(resolve(tree))
    worker.attach({"rollout": {0: "first", 1: "second"}})
    engines = worker.workers["rollout"]
    engines.lost[0] = "died"
    engines.lost[1] = "no answer"  # while the driver replaces the first
    worker.attach({"rollout": {0: "third", 1: "second"}})
    assert engines.actors == {0: "third", 1: "second"} and engines.lost == {1: "no answer"}


def test_an_engine_whose_load_failed_raises_the_error_until_it_has_weights(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An engine that replaces another loads alone: a lost rank must not look like an error of the engine."""
    from ray.exceptions import RayActorError

    config = resolve(rl_trees.run_tree(corpus, rl_trees.write_prompts(tmp_path / "prompts"), tmp_path / "run"))
    monkeypatch.setattr(rollout.cpu, "tune", lambda: None)
    model = PRESETS["minimind3_tiny"].replace(vocab_size=corpus.vocab_size)
    worker = rollout.RolloutWorker(config, model, corpus.vocab_size, torch.get_num_threads())
    prompt: Any = ([[5, 6]], 1, RolloutSamplingParams(max_tokens=2), [0])
    with pytest.raises(RuntimeError, match="has no weights"):
        worker.generate(*prompt)

    state: dict[str, torch.Tensor] = {}

    def of_dead_rank() -> Any:
        raise RayActorError
        yield

    source: Any = SimpleNamespace(tensors=lambda: iter(state.items()))
    dead: Any = SimpleNamespace(tensors=of_dead_rank)
    for name, shape in mcore_shapes(model).items():
        state[name] = torch.ones(shape)
    for _ in range(2):
        with pytest.raises(RayActorError):
            worker.load(dead)
        for call in (lambda: worker.generate(*prompt), lambda: worker.check(source)):
            with pytest.raises(RayActorError):
                call()
        worker.load(source)
        assert len(worker.generate(*prompt)[0].ids) == 2


def test_a_step_knows_which_weights_generated_it(corpus: Corpus, tmp_path: Path) -> None:
    worker = manager_of(corpus, tmp_path, Writers(1))
    division = Division(1, 1, 4, 4, 4, "token-mean", 1)
    found = []
    for step in (1, 2, 3, 4):
        worker.generate(step, 2 if step < 3 else 0)
        for begun in worker.begun:  # generated while the step is trained
            begun.result()
        worker.pause()
        found.append(worker.shards(division, step)[1].weights)  # type: ignore[union-attr]
    # Step 1 begins 2 and 3, and step 2 begins 4 with the weights that step 1 has trained.
    assert found == [0, 0, 0, 1]


@pytest.mark.parametrize("size", [2, Budget(60, None)])
def test_every_rank_gets_its_rows_alone_and_together_they_are_the_batch(size: int | Budget) -> None:
    numbers = random.Random(0)
    lengths = [numbers.randrange(1, 20) for _ in range(16)]
    batch = batches.make(
        [[5] * 3] * 16, [[7] * n for n in lengths], [[-1.0] * n for n in lengths], [True] * 16, [0] * 16
    )
    batch = dataclasses.replace(batch, rewards=torch.arange(16.0))
    division = Division(4, 4, size, size, size, "token-mean", 1)
    shards = trained(batch, division, list(mini_batches(4, 4, 2, 1, False, 1)))
    assert sorted(row for shard in shards for row in shard.rows) == list(range(16))
    for shard in shards:
        assert shard.batch.rewards is not None and shard.batch.rewards.tolist() == shard.rows
        assert len(shard.mini_batches) == 2
        assert [float(mini.total) for mini in shard.mini_batches] == [sum(lengths[:8]), sum(lengths[8:])]
        rows = [row for mini in shard.mini_batches for part in mini.micro_batches for row in part]
        assert sorted(rows) == list(range(len(shard.rows)))
    asked = measured(batch, division)
    assert sorted(row for shard in asked for row in shard.rows if row >= 0) == list(range(16))
    assert len({len(shard.mini_batches[0].micro_batches) for shard in asked}) == 1


def test_work_goes_to_whoever_is_free_and_that_of_the_dead_to_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three parts for two actors, of which the second dies with the first part that it takes."""
    from ray.exceptions import RayActorError

    done: list[tuple[str, int]] = []

    class Method:
        def __init__(self, actor: str) -> None:
            self.actor = actor

        def remote(self, part: int) -> tuple[str, int]:
            done.append((self.actor, part))
            return self.actor, part

    class Actor:
        def __init__(self, name: str) -> None:
            self.double = Method(name)

    def get(ref: tuple[str, int], timeout: float = 0) -> int:
        if ref[0] == "b":
            raise RayActorError
        return 2 * ref[1]

    monkeypatch.setattr(supervise.ray, "wait", lambda refs, **_: (refs[:1], refs[1:]))
    monkeypatch.setattr(supervise.ray, "get", get)
    workers = supervise.Workers(10.0)
    workers.actors = {0: Actor("a"), 1: Actor("b")}
    assert workers.run("double", [(1,), (2,), (3,)]) == [2, 4, 6]
    assert list(workers.lost) == [1] and {part for actor, part in done if actor == "a"} == {1, 2, 3}
    workers.actors = {1: Actor("b")}
    with pytest.raises(supervise.WorkersLost):
        workers.run("double", [(1,)])
