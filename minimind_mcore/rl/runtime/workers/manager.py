"""The rollout manager as a Ray actor, and the driver's side of it.

The actor holds the trajectories of a step. The driver only holds references: `RolloutClient.shards` has the actor make
one object for each data-parallel rank, and Ray passes them from the actor to the ranks. They are results of a call of
the driver, so they outlive the actor.
"""

from __future__ import annotations

import dataclasses
import itertools
import threading
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import ray
import torch
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from minimind_mcore import log
from minimind_mcore.inference.loading import load_tokenizer
from minimind_mcore.preprocess.tokenize import tokenizer_info
from minimind_mcore.rl.algorithms.batches import mini_batches
from minimind_mcore.rl.config.objective import objective
from minimind_mcore.rl.config.schema import Config
from minimind_mcore.rl.runtime import experience as files
from minimind_mcore.rl.runtime import sharding, supervise
from minimind_mcore.rl.runtime.advantages import Advantages
from minimind_mcore.rl.runtime.data import PromptDataset, prompt_dataset
from minimind_mcore.rl.runtime.experience import Experience
from minimind_mcore.rl.runtime.metrics import Row, data_metrics, difference, lengths_of
from minimind_mcore.rl.runtime.rollouts import Position, RolloutManager, Workers
from minimind_mcore.rl.runtime.sharding import Division, Shard, Share
from minimind_mcore.rl.runtime.supervise import ActorPool, Lost, Restarts, WorkersLost, collect

Column = Literal["old_logp", "ref_logp", "values"]
Kind = Literal["rollout", "reward"]


class ManagerLost(Lost):
    """The rollout manager died, and the step's trajectories with it."""


@dataclass(frozen=True)
class Answer:
    """What the manager returns.

    Attributes:
        value: of the call.
        complete: False: no worker of a kind is left. The call is to be made again.
        lost: numbers of the workers that died, and why.
    """

    value: Any
    complete: bool
    lost: Mapping[Kind, Mapping[int, str]]


@dataclass(frozen=True)
class Scored:
    """What the driver needs to know of a step.

    Attributes:
        metrics: of rewards, lengths and advantages.
        lengths: see `metrics.lengths_of`.
        kl_coef: coefficient of the reference's term in the update.
        state: what a resumed run needs, after this step.
        samples: some responses, for people.
        failures: some responses that could not be scored.
    """

    metrics: Row
    lengths: tuple[float, float]
    kl_coef: float
    state: dict[str, Any]
    samples: list[dict[str, Any]]
    failures: list[str]


class ManagerWorker:
    """The rollout manager. Generation and scoring run in threads, so that they go on between the calls.

    Args:
        config: of the run.
        engines: calls `RolloutWorker`s; set by `attach` where they are Ray actors.
        rewards: likewise `RewardWorker`s.
    """

    def __init__(self, config: Config, engines: Workers | None = None, rewards: Workers | None = None) -> None:
        log.setup()
        self.config = config
        timeout = config.minimind.actor_timeout_s
        self.workers: dict[Kind, Any] = {
            "rollout": engines or supervise.Workers(timeout),
            "reward": rewards or supervise.Workers(timeout),
        }
        self.threads = {name: ThreadPoolExecutor(1, name) for name in ("generate", "score")}
        self.begun: deque[Future[Experience]] = deque()
        self.epoch = 0  # work that was begun in an earlier one is not wanted
        self.failed: int | None = None  # the epoch in which a step failed: what was begun behind the step fails too
        self.weights = 0  # of the engines: see `Experience.weights`
        self.gate, self.busy = threading.Event(), threading.Lock()
        self.gate.set()

    def prepare(self, position: Position, state: dict[str, Any]) -> None:
        """Open the data. Not in `__init__`, where an error would end the actor."""
        config = self.config
        self.algorithm, info = objective(config), tokenizer_info(config.actor.tokenizer_name_or_path)
        prompts, eos = prompt_dataset(config, config.actor.data_path), info.eos_id
        assert eos is not None  # `Trainer` has checked
        self.manager = RolloutManager(
            config, self.algorithm, prompts, load_tokenizer(info), eos, self.workers["rollout"], self.workers["reward"]
        )
        self.held_out: dict[str, PromptDataset] = {}
        self.go_to(position, state)

    def attach(self, actors: Mapping[Kind, Mapping[int, Any]]) -> None:
        """Use these actors from now on."""
        for kind, some in actors.items():
            self.workers[kind].use(some)

    def go_to(self, position: Position, state: dict[str, Any]) -> None:
        """Go on at another place in the data; what was begun is dropped."""
        self.epoch += 1
        self._want(False)
        self.gate.set()
        with self.busy:
            self._want(True)
            self.begun.clear()
            self.manager.go_to(position)
        self.advantages = Advantages(self.config, self.algorithm)
        self.advantages.load_state_dict(state)

    def _want(self, wanted: bool) -> None:
        for workers in self.workers.values():
            if isinstance(workers, supervise.Workers):
                (workers.unwanted.clear if wanted else workers.unwanted.set)()

    def ask(self, method: str, *arguments: Any) -> Answer:
        """Call a method; if the workers of a kind are lost, nothing has happened."""
        value, complete = None, True
        try:
            value = getattr(self, method)(*arguments)
        except WorkersLost:
            complete = False
        return Answer(value, complete, {kind: dict(getattr(one, "lost", {})) for kind, one in self.workers.items()})

    # --------------------------------------------------------------------------------------------- generation

    def generate(self, step: int, ahead: int) -> int:
        """Take the responses of a step; returns how many there are.

        Args:
            step: to be trained.
            ahead: later steps whose responses are begun now, with the weights that the engines have.
        """
        self.weights = step - 1  # the engines got new weights since the last call, and nothing was begun in between
        self.gate.set()
        n = self.config.rl.n_samples_per_prompt
        if self.config.minimind.replay_rollouts:
            folder, prompts = Path(self.config.minimind.replay_rollouts), self.config.actor.global_batch_size
            self.experience = files.replayed(folder, step, n, prompts)
            return len(self.experience.batch)
        while len(self.begun) < 1 + ahead:
            self.begun.append(self.threads["generate"].submit(self._generate, self.epoch))
        try:
            self.experience = self.begun.popleft().result()
        except WorkersLost:
            # The failed step has put its prompts back. Only what is begun from here on may take them.
            self.epoch += 1
            self.begun.clear()
            raise
        self._score()
        return len(self.experience.batch)

    def _generate(self, epoch: int) -> Experience:
        while True:
            self.gate.wait()
            with self.busy:
                if not self.gate.is_set():
                    continue
                if epoch != self.epoch or epoch == self.failed:
                    raise WorkersLost("generate")
                position, weights = self.manager.position, self.weights
                selects = self.algorithm.dynamic_sampling or self.manager.filter
                try:
                    found = self.manager.generate_differing() if selects else self.manager.generate()
                    return dataclasses.replace(found, weights=weights)
                except WorkersLost:
                    self.failed = epoch
                    self.manager.go_to(position)
                    raise

    def pause(self) -> None:
        """Wait for the responses that are being generated, and begin no others until the next `generate`."""
        self.gate.clear()
        with self.busy:
            pass

    def evaluate(self, name: str, count: int, samples: int) -> Row:
        """See `RolloutManager.evaluate`; the name is that of a set of `minimind.eval_data`."""
        if name not in self.held_out:
            paths = {Path(path).name: path for path in self.config.minimind.eval_data or ()}
            self.held_out[name] = prompt_dataset(self.config, paths[name], True)
        return self.manager.evaluate(self.held_out[name], count, samples)

    # ------------------------------------------------------------------------------------------------- a step

    def _score(self) -> None:
        self.scoring = self.threads["score"].submit(self._scored, self.experience)

    def _scored(self, experience: Experience) -> None:
        if experience.batch.rewards is None:  # dynamic sampling has scored
            self.manager.score(experience)

    def shards(self, division: Division, step: int | None = None) -> list[Shard | None]:
        """None, and one shard for each data-parallel rank: to train on at a step, or to measure."""
        batch, rl = self.experience.batch, self.config.rl
        if step is None:
            bare = dataclasses.replace(
                batch, rewards=None, rollout_logp=None, old_logp=None, ref_logp=None, values=None
            )
            return [None, *sharding.measured(bare, division)]
        n, size = rl.n_samples_per_prompt, rl.mini_batch_size // rl.n_samples_per_prompt
        orders = mini_batches(len(batch) // n, n, size, rl.epochs, rl.shuffle_mini_batch, division.seed + step)
        return [None, *sharding.trained(batch, division, list(orders), self.experience.weights)]

    def fill(self, column: Column, *shares: Share | None) -> None:
        """Take in what the ranks of a model have measured."""
        batch = self.experience.batch
        whole = torch.zeros_like(batch.mask)
        for share in shares:
            if share is not None:
                values = share.columns["values" if column == "values" else "logp"]
                whole[share.rows, : values.shape[1]] = values
        setattr(batch, column, whole)

    def rewards(self) -> None:
        """Wait for the rewards."""
        if self.config.minimind.replay_rollouts:
            return
        try:
            self.scoring.result()
        except WorkersLost:
            self._score()
            raise

    def compute_advantages(self, step: int, own_ratio: bool) -> Scored:
        """Fill in the advantages.

        Args:
            step: to be trained.
            own_ratio: the update's ratio is to the engines' log-probabilities.
        """
        experience, ours, batch = self.experience, self.config.minimind, self.experience.batch
        if own_ratio:
            batch.old_logp = batch.rollout_logp
        metrics = self.advantages.fill(batch)
        if batch.old_logp is not None and not own_ratio:  # without old_log_p the update measures it
            metrics |= difference(batch, batch.old_logp)
        family = {"dapo": "dapo", "ppo": "ppo"}.get(ours.algorithm, "grpo")
        for name in dict.fromkeys((family, "grpo")):
            metrics |= data_metrics(name, batch)
        if ours.save_rollouts:
            files.save(experience, Path(ours.save_rollouts), step, self.config.rl.n_samples_per_prompt)
        assert batch.rewards is not None
        names = ("prompt", "response", "label", "segments", "advantage")
        samples = [
            {name: one[name] for name in names if name in one} | {"reward": f"{one['reward']:.2f}"}
            for one in itertools.islice(files.trajectories(experience, step), 4)
        ]
        state = {
            "consumed": experience.consumed,
            **({"carried": list(experience.carried)} if experience.carried else {}),
            "advantages": self.advantages.state_dict(),
        }
        return Scored(
            metrics | experience.metrics, lengths_of(batch), self.advantages.kl_coef, state, samples,
            experience.failures,
        )  # fmt: skip


class RolloutClient:
    """The driver's side of the rollout manager. It replaces workers that the manager has lost.

    Args:
        start: makes the actor.
        pools: the engines and the reward workers.
        restarts: of the manager.
    """

    name = "rollout manager"

    def __init__(self, start: Callable[[], Any], pools: Mapping[Kind, ActorPool], restarts: Restarts) -> None:
        self.start, self.pools, self.restarts = start, pools, restarts
        self.actor: Any = None
        self.attached: dict[Kind, dict[int, Any]] = {}
        self.sent: dict[Division, list[Any]] = {}  # shards of this step that are measured

    def go_to(self, position: Position, state: dict[str, Any]) -> None:
        """Go on at another place in the data; see `ManagerWorker`. Starts the actor where there is none."""
        self.sent = {}
        if self.actor is not None:
            self.ask("go_to", position, state)
            return
        self.actor = self.start()
        self.attached = {}
        self._collect([self.actor.prepare.remote(position, state)], "prepare")

    def replace(self, loss: Lost) -> None:
        """End the actor, if it still is; `go_to` starts another.

        Raises:
            UserError: it was replaced too often.
        """
        supervise.stop([self.actor])
        self.actor = None
        self.restarts.another(loss)

    def close(self) -> None:
        """End the actor."""
        if self.actor is not None:
            supervise.stop([self.actor])

    def submit(self, method: str, *arguments: Any) -> Any:
        """Begin a call of the manager's method; returns a reference of its `Answer`."""
        return self.actor.ask.remote(method, *arguments)

    def ask(self, method: str, *arguments: Any) -> Any:
        """Call a method of the manager, again and again while workers are lost.

        Raises:
            ManagerLost: the manager died.
            UserError: as the manager raised it, or workers died too often.
        """
        while True:
            self._attach()
            [answer] = self._collect([self.submit(method, *arguments)], method)
            for kind, lost in answer.lost.items():
                for number, why in lost.items():
                    self.pools[kind].replace(number)
                    self.pools[kind].restarts.another(Lost([self.pools[kind].name(number)], why))
            if answer.complete:
                return answer.value

    def _attach(self) -> None:
        """Tell the manager which actors there are, if some were replaced."""
        for kind, pool in self.pools.items():
            for number, actor in enumerate(pool.actors):
                if self.attached.get(kind, {}).get(number) != actor:
                    self._wait_for(pool, number)
        actors: dict[Kind, dict[int, Any]] = {kind: dict(enumerate(pool.actors)) for kind, pool in self.pools.items()}
        if actors != self.attached:
            self._collect([self.actor.attach.remote(actors)], "attach")
            self.attached = actors

    def _wait_for(self, pool: ActorPool, number: int) -> None:
        """Wait until a new actor has done what the driver asked of it: an engine then has its weights, or has failed.

        An engine that failed to load raises the error when the manager calls it.

        Ray keeps the order of calls for one caller only, and the manager is another.
        """
        while True:
            try:
                collect([pool.actors[number].__ray_ready__.remote()], [pool.name(number)], "start", pool.timeout)
                return
            except Lost as loss:
                pool.replace(number)
                pool.restarts.another(loss)

    def _collect(self, refs: list[Any], what: str) -> list[Any]:
        try:
            # The manager has a deadline for each call of a worker, and no bound on their number.
            return collect(refs, [self.name] * len(refs), what, supervise.LONGEST_SECONDS)
        except Lost as loss:
            raise ManagerLost([self.name], str(loss).partition(": ")[2]) from loss

    def generate(self, step: int, ahead: int = 0) -> int:
        """See `ManagerWorker.generate`."""
        self.sent = {}
        return int(self.ask("generate", step, ahead))

    def evaluate(self, name: str, count: int, samples: int) -> Row:
        """See `ManagerWorker.evaluate`."""
        found: Row = self.ask("evaluate", name, count, samples)
        return found

    def shards(self, division: Division, step: int | None = None) -> list[Any]:
        """References of the shards of each data-parallel rank; see `ManagerWorker.shards`."""
        if step is None and division in self.sent:
            return self.sent[division]
        # The first result is None: it tells of errors, and the driver does not fetch the others.
        refs: list[Any]
        done, *refs = self.actor.shards.options(num_returns=1 + division.ranks).remote(division, step)
        self._collect([done], "shards")
        if step is None:
            self.sent[division] = refs
        return refs


def start_manager(config: Config) -> Any:
    """The actor, on the driver's host, where the data is."""
    node = ray.get_runtime_context().get_node_id()
    remote: Any = ray.remote(ManagerWorker)
    strategy = NodeAffinitySchedulingStrategy(node, soft=False)
    return remote.options(num_cpus=0, scheduling_strategy=strategy).remote(config)
