"""Reinforcement learning from rewards, from top to bottom: `train`.

python train_grpo.py --config-name grpo_minimind_tiny

The actor's ranks hold the weights. A step lets the engines write responses with them, scores the responses, compares
the scores with the expectation, trains on the difference, and hands the new weights to the engines. Synchronous by
default; with `rl_config.blocking: false` the engines write the responses of the next steps meanwhile, with weights that
are up to `minimind.staleness` steps old.

This program holds no model and no responses. The rollout manager holds the responses (`workers/manager.py`), the
groups of workers hold the models (`placement.py`), and what passes between them are references.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import sys
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from minimind_mcore.errors import UserError
from minimind_mcore.preprocess.tokenize import tokenizer_info
from minimind_mcore.rl.config.objective import objective, steps_ahead, trains_on_older, updates_per_step
from minimind_mcore.rl.config.schema import Config
from minimind_mcore.rl.runtime.data import prompt_dataset
from minimind_mcore.rl.runtime.metrics import Clock, Log, Row, require_same_model, say, throughput
from minimind_mcore.rl.runtime.placement import WorkerGroups, devices
from minimind_mcore.rl.runtime.rollouts import Position
from minimind_mcore.rl.runtime.stop import Stop
from minimind_mcore.rl.runtime.supervise import Lost
from minimind_mcore.rl.runtime.workers.manager import Column, ManagerLost, Scored
from minimind_mcore.rl.runtime.workers.train import TrainGroup
from minimind_mcore.training import run_lock, sample_order
from minimind_mcore.training.metrics import read_history
from minimind_mcore.training.report import write_report

logger = logging.getLogger(__name__)

EVALUATION = {"eval/accuracy", "eval/score"}  # an evaluation's row has one of them: see `RolloutManager.evaluate`


def run(config: Config) -> None:
    """Run a configuration.

    Exits with 128 + its number when a signal asked to save and leave.

    Raises:
        UserError: something that the user can put right; checkpoints are whole, and the same command goes on.
    """
    output_dir = Path(config.minimind.output_dir)
    save = Path(config.actor.save) if config.actor.save else None
    run_lock.take(output_dir, save, "give another directory with minimind.output_dir and megatron_training.save")
    trainer = Trainer(config)
    try:
        train(trainer)
    finally:
        trainer.groups.close()
    run_lock.release()
    if trainer.left:
        sys.exit(trainer.stop.status)


def train(trainer: Trainer) -> None:
    """Train until the last step and its evaluation are done, or a signal asks to leave.

    After the loss of a training rank the run goes on from the last checkpoint.
    """
    trainer.start()
    while trainer.unfinished():
        try:
            with trainer.signals_wait():
                if trainer.evaluation_due():
                    trainer.evaluate()
                else:
                    trainer.generate()
                    trainer.score()
                    scored = trainer.compute_advantages()
                    metrics = trainer.update(scored)
                    trainer.sync_weights()
                    trainer.report(scored, metrics)
                trainer.save_if_due()
        except Lost as loss:
            trainer.recover(loss)
    trainer.finish()


class Trainer:
    """The driver of a run. It holds no model: the worker groups do.

    Attributes:
        done: steps that are trained.
        saved: the step of the last checkpoint.
        state: what a checkpoint of the last step that is done has of the data and the algorithm.
        left: a signal ended the run before the last step.
    """

    def __init__(self, config: Config) -> None:
        self.config, self.rl, self.minimind = config, config.rl, config.minimind
        self.algorithm = objective(config)
        info = tokenizer_info(config.actor.tokenizer_name_or_path)
        if info.eos_id is None:
            raise UserError(f"{info.path}: tokenizer_config.json names no eos_token, which ends a response")
        # Opened here too, so that what is wrong with the data is said before any process starts.
        prompts = prompt_dataset(config, config.actor.data_path)
        self.held_out = {Path(at).name: prompt_dataset(config, at, True) for at in self.minimind.eval_data or ()}
        self.groups = WorkerGroups(config, self.algorithm, info.vocab_size)  # from here on there are processes
        self.rollouts = self.groups.manager
        self.steps = config.actor.train_iters
        self.done = self.saved = 0
        self.state: dict[str, Any] = {}
        self.left = False
        self.order, self.warned = prompts.order_settings(), False  # checkpoints carry them; a resumed run compares
        correction = self.minimind.rollout_correction != "none"
        # Engines that are steps ahead, and responses that are continued, are of older weights than the present ones.
        # The ratio is then taken to the engines' own log-probabilities, or their difference is corrected for.
        self.ahead = steps_ahead(config)
        self.own_ratio = trains_on_older(config) and not correction
        # With a single update the policy is still the one that wrote the responses: the ratio is 1.
        self.needs_old = not self.own_ratio and (updates_per_step(config) > 1 or correction)

    # ------------------------------------------------------------------------------------------ beginning and end

    def start(self) -> None:
        """Load the weights, and read which evaluations are done."""
        self.stop = Stop()
        self.groups.cluster.waiting = self.stop.at_once
        self.recover()
        self.log = Log(self.config, self.done)
        rows = read_history(self.log.history)
        self.evaluated = {int(row["iteration"]) for row in rows if not EVALUATION.isdisjoint(row)}

    def recover(self, loss: Lost | None = None) -> None:
        """Load the last checkpoint, until it works; a loss of training ranks is counted.

        A loss of the rollout manager costs the responses of the step, which is done again. If the manager is lost while
        a checkpoint is loaded, the checkpoint is loaded again: the engines may not have its weights yet.
        """
        load = not isinstance(loss, ManagerLost)
        while True:
            try:
                if isinstance(loss, ManagerLost):
                    self.rollouts.replace(loss)
                elif loss is not None:
                    self.groups.restarts.another(loss)
                if load:
                    self.load()
                else:
                    self.go_to(self.state)
                return
            except Lost as error:
                loss, load = error, load or not isinstance(error, ManagerLost)

    def load(self) -> None:
        """Start the training ranks from the last checkpoint, or the weights to begin with; the engines get them."""
        found = self.groups.start()
        state = found["state"] or {}
        self.done = self.saved = found["iteration"]
        self.go_to(state)
        differing = list(sample_order.values_differ(state.get("order", {}), self.order))
        if differing and not self.warned:
            say(f"warning: {sample_order.warning(str(self.config.actor.save), differing)}")
            self.warned = True
        self.groups.rollout.load(self.groups.actor.weights(keep=self.ahead > 0)).result()
        self.check_weights()
        say(f"{self.config.model}: {self.minimind.algorithm}, step {self.done} of {self.steps} is done")

    def go_to(self, state: dict[str, Any]) -> None:
        """Go on where a step ended."""
        self.state = state
        position = Position(state.get("consumed", 0), tuple(state.get("carried", ())))
        self.rollouts.go_to(position, state.get("advantages", {}))

    def unfinished(self) -> bool:
        """Whether there is a step or an evaluation to do."""
        return not self.left and (self.done < self.steps or self.evaluation_due())

    def signals_wait(self) -> AbstractContextManager[None]:
        """Inside, a signal waits for `save_if_due`; not where a checkpoint holds everything, and evaluation repeats."""
        return contextlib.nullcontext() if self.evaluation_due() and self.saved == self.done else self.stop.later()

    def finish(self) -> None:
        """Write the report."""
        self.log.close()
        title = f"MiniMind {self.minimind.algorithm}, {self.config.model}"
        write_report(Path(self.minimind.output_dir), title, ("grpo/score/mean", *sorted(EVALUATION)), "reward.png")
        logger.info(self.log.outcome())

    # ------------------------------------------------------------------------------------------------------ a step

    def generate(self) -> None:
        """Have the engines write the responses of this step; steps ahead they then go on with the next prompts."""
        self.clock = Clock()
        with self.clock("rollout"):
            self.rollouts.generate(self.done + 1, min(self.ahead, self.steps - self.done - 1))

    def score(self) -> None:
        """Measure log-probabilities and values. The manager has begun with the rewards, and goes on meanwhile."""
        groups = self.groups
        if self.algorithm.kl != "none":
            with self.clock("reference_model"):
                self.measure(groups.reference or groups.actor, "ref_logp", reference=True)
        if self.needs_old:
            with self.clock("old_log_p"):
                self.measure(groups.actor, "old_logp")
        if groups.critic:
            with self.clock("critic_values"):
                self.measure(groups.critic, "values")

    def measure(self, group: TrainGroup, column: Column, reference: bool = False) -> None:
        """Have a model measure the responses, and the manager take in what it says."""
        division = group.division
        if reference:
            division = dataclasses.replace(division, forward=division.reference)
        self.rollouts.ask("fill", column, *group.measure(self.rollouts.shards(division), reference))

    def compute_advantages(self) -> Scored:
        """Wait for the rewards; fill in the advantages."""
        with self.clock("rule_reward"):
            self.rollouts.ask("rewards")
        with self.clock("adv"):
            found: Scored = self.rollouts.ask("compute_advantages", self.done + 1, self.own_ratio)
            return found

    def update(self, scored: Scored) -> Row:
        """Train the actor, and the critic, on a step's responses."""
        metrics, groups = dict(scored.metrics), self.groups.training()
        with self.clock("update"):
            # The manager is asked before the first update only: if it were lost between two updates, the step would be
            # done again, and the actor trained on it twice.
            shards = [self.rollouts.shards(group.division, self.done + 1) for group in groups]
            for group, own in zip(groups, shards, strict=True):
                metrics = group.update(own, self.done + 1, scored.kl_coef) | metrics
        # Saved responses may be of other weights, and those that are continued are.
        if not self.minimind.replay_rollouts and self.rl.partial_rollout_max_split == 1:
            require_same_model(metrics, self.minimind.precision)
        return metrics

    def sync_weights(self) -> None:
        """Hand the weights to the engines; every `weight_check_interval` steps check that the engines have them."""
        step, interval = self.done + 1, self.minimind.weight_check_interval
        with self.clock("resharding_to_infer"):
            if self.ahead:
                # A rollout is of the weights of one step. A manager that is lost generates nothing, and the step is
                # trained already: the next call replaces the manager, after this step is counted.
                with contextlib.suppress(ManagerLost):
                    self.rollouts.ask("pause")
            self.groups.rollout.load(self.groups.actor.weights(keep=self.ahead > 0)).result()
            if interval and step % interval == 0:
                self.check_weights()
                say(f"weights of the rollout engines checked at step {step}: spoilt, sent again, equal")

    def check_weights(self) -> None:
        """Require that every engine holds the ranks' weights: spoil the engine's, send them again, compare.

        Raises:
            RuntimeError: some tensors are not what they were.
        """
        if wrong := self.groups.rollout.check():
            raise RuntimeError(f"weight sync: {len(wrong)} tensors are not restored: {', '.join(wrong[:4])}")

    def report(self, scored: Scored, metrics: Row) -> None:
        """Count the step, and write its metrics and samples."""
        self.done, self.state = self.done + 1, scored.state
        self.groups.finished(self.done)
        row = {**self.clock.row(), **metrics}
        row |= throughput(scored.lengths, row, devices(self.rl, "actor"), self.rl.log_max_throughput)
        self.log.step(self.done, row)
        for failure in scored.failures:
            say(f"a response could not be scored: {failure}")
        if self.minimind.sample_interval and self.done % self.minimind.sample_interval == 0:
            self.log.sample(self.done, scored.samples)

    # ------------------------------------------------------------------------------------------- between the steps

    def evaluation_due(self) -> bool:
        """Whether the evaluation of this step is still to do: before the first step, after the last, between them."""
        every = self.minimind.eval_interval
        due = self.done in (0, self.steps) or (every and self.done % every == 0)
        return bool(self.held_out and due and self.done not in self.evaluated)

    def evaluate(self) -> None:
        """Measure accuracy, or score, on each set of held-out questions; `eval/accuracy` is that of the first."""
        self.rollouts.ask("pause")
        row: Row = {}
        for name in self.held_out:
            found = self.rollouts.evaluate(name, self.minimind.eval_prompts, self.minimind.eval_samples)
            row = row or {f"eval/{metric}": value for metric, value in found.items()}
            row |= {f"eval/{name}/{key}": value for key, value in found.items()} if len(self.held_out) > 1 else {}
        self.log.step(self.done, row)
        self.evaluated.add(self.done)

    def save_if_due(self) -> None:
        """Write a checkpoint every `save_interval` steps, after the last one, or when a signal asks to leave."""
        actor, asked = self.config.actor, self.stop.asked
        due = asked or self.done == self.steps or (actor.save_interval and self.done % actor.save_interval == 0)
        if actor.save and due and self.saved != self.done:
            state = {**self.state, "order": self.order}
            # The actor's last: what it has saved the critic has too, and `WorkerGroups.start` goes by the actor.
            for group in reversed(self.groups.training()):
                group.save(self.done, state["consumed"], state)
            self.saved = self.done
        self.left = asked and self.done < self.steps
