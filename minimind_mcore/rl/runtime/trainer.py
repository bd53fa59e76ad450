"""Reinforcement learning from rewards, from top to bottom: `train`.

python train_grpo.py --config-name grpo_minimind_tiny

The actor's ranks hold the weights. A step lets the engines write responses with them, scores the responses, compares
the scores with the expectation, trains on the difference, and hands the new weights to the engines. Synchronous by
default; with `rl_config.blocking: false` the engines write the next step's responses meanwhile, with weights one step
old.
"""

from __future__ import annotations

import contextlib
import logging
import sys
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from minimind_mcore.errors import UserError
from minimind_mcore.inference.loading import load_tokenizer
from minimind_mcore.preprocess.tokenize import tokenizer_info
from minimind_mcore.rl.config.objective import objective
from minimind_mcore.rl.config.schema import Config
from minimind_mcore.rl.rewards.verifiers import VERIFIERS
from minimind_mcore.rl.runtime import rollouts
from minimind_mcore.rl.runtime.advantages import Advantages
from minimind_mcore.rl.runtime.data import PromptDataset
from minimind_mcore.rl.runtime.metrics import (
    Clock,
    Log,
    Row,
    data_metrics,
    difference,
    require_same_model,
    say,
    throughput,
)
from minimind_mcore.rl.runtime.placement import WorkerGroups, devices
from minimind_mcore.rl.runtime.rollouts import Experience, RolloutManager
from minimind_mcore.rl.runtime.stop import Stop
from minimind_mcore.rl.runtime.supervise import Lost
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
                    experience = trainer.generate()
                    trainer.score(experience)
                    metrics = trainer.compute_advantages(experience)
                    metrics |= trainer.update(experience)
                    trainer.sync_weights()
                    trainer.report(experience, metrics)
                trainer.save_if_due()
        except Lost as loss:
            trainer.recover(loss)
    trainer.finish()


def prompt_dataset(config: Config, prefix: Any, held_out: bool = False) -> PromptDataset:
    """The prompts of a prefix, as the configuration reads them; `split` is of those to train on.

    Raises:
        UserError: see `PromptDataset`; or they have no labels, which a verifier needs.
    """
    actor = config.actor
    prompts = PromptDataset(
        prefix[0] if isinstance(prefix, list) else prefix,
        actor.dataset_additional_keys,
        max_prompt_length=config.rl.max_prompt_length,
        seed=actor.seed,
        shuffle=not actor.no_shuffle,
        split=None if held_out else actor.split,
        tokenizer=tokenizer_info(actor.tokenizer_name_or_path).fingerprint,
        optional=("labels",),
    )
    compare = [name for name in config.reward_names if name in VERIFIERS and VERIFIERS[name].compares]
    if compare and "labels" not in prompts.columns:
        raise UserError(
            f"{prompts.prefix}: these prompts have no labels, which {', '.join(compare)} (verifier_function) compare a "
            "response with. Convert the data with a handler that writes them (R1AlpacaStyleInstructionHandler), or "
            "take what needs none: minimind_shape, minimind.reward_model, a function of your own"
        )
    return prompts


class Trainer:
    """The driver of a run. It holds no model: the worker groups do.

    Attributes:
        done: steps that are trained.
        saved: the step of the last checkpoint.
        consumed: prompts that these steps took.
        left: a signal ended the run before the last step.
    """

    def __init__(self, config: Config) -> None:
        self.config, self.rl, self.minimind = config, config.rl, config.minimind
        self.algorithm = objective(config)
        info = tokenizer_info(config.actor.tokenizer_name_or_path)
        if info.eos_id is None:
            raise UserError(f"{info.path}: tokenizer_config.json names no eos_token, which ends a response")
        prompts = prompt_dataset(config, config.actor.data_path)
        self.held_out = {Path(at).name: prompt_dataset(config, at, True) for at in self.minimind.eval_data or ()}
        tokenizer = load_tokenizer(info)
        self.advantages = Advantages(config, self.algorithm)
        self.groups = WorkerGroups(config, self.algorithm, info.vocab_size)  # from here on there are processes
        workers = (self.groups.rollout, self.groups.rewards)
        self.rollouts = RolloutManager(config, self.algorithm, prompts, tokenizer, info.eos_id, *workers)
        self.steps = config.actor.train_iters
        self.done = self.saved = self.consumed = 0
        self.left = False
        self.order, self.warned = prompts.order_settings(), False  # checkpoints carry them; a resumed run compares
        updates = config.actor.global_batch_size * self.rl.n_samples_per_prompt // self.rl.mini_batch_size
        # With a single update the policy is still the one that wrote the responses: the ratio is 1.
        self.needs_old = updates * self.rl.epochs > 1 or self.minimind.rollout_correction != "none"
        self.ahead = not self.rl.blocking  # the engines write a step's responses while the one before is trained

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
        """Load the last checkpoint, until it works; a loss of training ranks is counted."""
        while True:
            try:
                if loss is not None:
                    self.groups.restarts.another(loss)
                self.load()
                return
            except Lost as error:
                loss = error

    def load(self) -> None:
        """Start the training ranks from the last checkpoint, or the weights to begin with; the engines get them."""
        found = self.groups.start()
        state = found["state"] or {}
        self.done = self.saved = found["iteration"]
        self.advantages.load_state_dict(state.get("advantages", {}))
        self.rollouts.go_to(state.get("consumed", 0))
        differing = list(sample_order.values_differ(state.get("order", {}), self.order))
        if differing and not self.warned:
            say(f"warning: {sample_order.warning(str(self.config.actor.save), differing)}")
            self.warned = True
        self.loading = self.groups.rollout.load(self.groups.actor.weights())
        self.loading.result()
        say(f"{self.config.model}: {self.minimind.algorithm}, step {self.done} of {self.steps} is done")

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

    def generate(self) -> Experience:
        """Return the responses of the next step; one step ahead the engines then go on with the next prompts."""
        self.clock = Clock()
        step, replay = self.done + 1, self.minimind.replay_rollouts
        with self.clock("rollout"):
            if replay:
                return rollouts.replayed(Path(replay), step, self.rl.n_samples_per_prompt)
            if self.algorithm.dynamic_sampling:
                return self.rollouts.generate_differing()
            experience = self.rollouts.generate()
            if self.ahead and step < self.steps:
                self.rollouts.begin()
            return experience

    def score(self, experience: Experience) -> None:
        """Fill in rewards, log-probabilities and values: the verifiers run while the ranks compute."""
        batch, groups = experience.batch, self.groups
        scored = self.rollouts.score(experience) if batch.rewards is None else None  # None: it was scored before
        if self.algorithm.kl != "none":
            with self.clock("reference_model"):
                batch.ref_logp = (groups.reference or groups.actor).measure(batch, reference=True)["logp"]
        if self.ahead:  # the weights that wrote the responses are a step old: the ratio is taken to their own
            batch.old_logp = batch.rollout_logp
        elif self.needs_old:
            with self.clock("old_log_p"):
                batch.old_logp = groups.actor.measure(batch)["logp"]
        if groups.critic:
            with self.clock("critic_values"):
                batch.values = groups.critic.measure(batch)["values"]
        with self.clock("rule_reward"):
            if scored is not None:
                scored()

    def compute_advantages(self, experience: Experience) -> Row:
        """Fill in the advantages."""
        with self.clock("adv"):
            return self.advantages.fill(experience.batch)

    def update(self, experience: Experience) -> Row:
        """Train the actor, and the critic, on a step's responses."""
        batch, metrics = experience.batch, dict[str, float]()
        with self.clock("update"):
            for group in self.groups.training():
                metrics |= group.update(batch, self.done + 1, self.advantages.kl_coef)
        if batch.old_logp is not None and not self.ahead:  # without old_log_p the update has measured it
            metrics |= difference(batch, batch.old_logp)
        if not self.minimind.replay_rollouts:  # saved responses may be of other weights
            require_same_model(metrics, self.minimind.precision)
        return metrics

    def sync_weights(self) -> None:
        """Hand the weights to the engines; every so many steps check that they then have them."""
        step, interval = self.done + 1, self.minimind.weight_check_interval
        with self.clock("resharding_to_infer"):
            self.loading.result()
            self.loading = self.groups.rollout.load(self.groups.actor.weights())
            if not self.ahead:
                self.loading.result()
            if interval and step % interval == 0:
                if wrong := self.groups.rollout.check():
                    raise RuntimeError(f"weight sync: {len(wrong)} tensors are not restored: {', '.join(wrong[:4])}")
                say(f"weights of the rollout engines checked at step {step}: spoilt, sent again, equal")

    def report(self, experience: Experience, metrics: Row) -> None:
        """Count the step, and write its metrics and samples."""
        self.done, self.consumed = self.done + 1, experience.consumed
        self.groups.finished(self.done)
        family = {"dapo": "dapo", "ppo": "ppo"}.get(self.minimind.algorithm, "grpo")
        batch = experience.batch
        row = {**self.clock.row(), **metrics, **data_metrics(family, batch), **experience.metrics}
        if family != "grpo":
            row |= data_metrics("grpo", batch)
        row |= throughput(batch, row, devices(self.rl, "actor"), self.rl.log_max_throughput)
        self.log.step(self.done, row)
        for failure in experience.failures:
            say(f"a response could not be scored: {failure}")
        if self.minimind.save_rollouts:
            rollouts.save(experience, Path(self.minimind.save_rollouts), self.done, self.rl.n_samples_per_prompt)
        if self.minimind.sample_interval and self.done % self.minimind.sample_interval == 0:
            assert batch.rewards is not None
            pairs = zip(experience.texts[:4], batch.rewards.tolist(), strict=False)
            shown = [{**text, "reward": f"{reward:.2f}"} for text, reward in pairs]
            self.log.sample(self.done, shown)

    # ------------------------------------------------------------------------------------------- between the steps

    def evaluation_due(self) -> bool:
        """Whether the evaluation of this step is still to do: before the first step, after the last, between them."""
        every = self.minimind.eval_interval
        due = self.done in (0, self.steps) or (every and self.done % every == 0)
        return bool(self.held_out and due and self.done not in self.evaluated)

    def evaluate(self) -> None:
        """Measure accuracy, or score, on each set of held-out questions; `eval/accuracy` is that of the first."""
        self.loading.result()
        row: Row = {}
        for name, prompts in self.held_out.items():
            found = self.rollouts.evaluate(prompts, self.minimind.eval_prompts, self.minimind.eval_samples)
            row = row or {f"eval/{metric}": value for metric, value in found.items()}
            row |= {f"eval/{name}/{key}": value for key, value in found.items()} if len(self.held_out) > 1 else {}
        self.log.step(self.done, row)
        self.evaluated.add(self.done)

    def save_if_due(self) -> None:
        """Write a checkpoint every `save_interval` steps, after the last one, or when a signal asks to leave."""
        actor, asked = self.config.actor, self.stop.asked
        due = asked or self.done == self.steps or (actor.save_interval and self.done % actor.save_interval == 0)
        if actor.save and due and self.saved != self.done:
            state = {"consumed": self.consumed, "advantages": self.advantages.state_dict(), "order": self.order}
            # The actor's last: what it has saved the critic has too, and `WorkerGroups.start` goes by the actor.
            for group in reversed(self.groups.training()):
                group.save(self.done, self.consumed, state)
            self.saved = self.done
        self.left = asked and self.done < self.steps
