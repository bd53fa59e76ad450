"""Reinforcement learning from rewards, from top to bottom.

python train_grpo.py --config-name grpo_minimind_tiny

The actor's ranks hold the weights. A step lets the engines write responses with them, scores these, compares them
with what was expected, trains on the difference, and hands the new weights to the engines. Synchronous by default;
with `rl_config.blocking: false` the engines write the next step's responses meanwhile, with weights one step old.
"""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import Any

from minimind_mcore.errors import UserError
from minimind_mcore.inference.loading import load_tokenizer
from minimind_mcore.preprocess.tokenize import tokenizer_info
from minimind_mcore.rl import experience as experiences
from minimind_mcore.rl.advantage import Advantages
from minimind_mcore.rl.config.objective import objective
from minimind_mcore.rl.config.schema import Config
from minimind_mcore.rl.data import PromptDataset
from minimind_mcore.rl.experience import Experience, Source
from minimind_mcore.rl.groups import Groups, devices
from minimind_mcore.rl.metrics import (
    Clock,
    Log,
    Row,
    data_metrics,
    difference,
    require_same_model,
    say,
    table,
    throughput,
)
from minimind_mcore.rl.rewards.verifiers import VERIFIERS
from minimind_mcore.rl.stop import Stop
from minimind_mcore.rl.supervise import Lost
from minimind_mcore.training import run_lock, sample_order
from minimind_mcore.training.metrics import read_history
from minimind_mcore.training.report import write_report

EVALUATION = {"eval/accuracy", "eval/score"}  # of a row, one of them: see `Source.evaluate`


def train(config: Config) -> None:
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
        trainer.run()
    finally:
        trainer.groups.close()
    run_lock.release()
    if trainer.left:
        sys.exit(trainer.stop.status)


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
    """The driver of a run. It holds no model: actors do."""

    def __init__(self, config: Config) -> None:
        self.config, self.ours, self.rl = config, config.minimind, config.rl
        self.algorithm = objective(config)
        info = tokenizer_info(config.actor.tokenizer_name_or_path)
        if info.eos_id is None:
            raise UserError(f"{info.path}: tokenizer_config.json names no eos_token, which ends a response")
        prompts = prompt_dataset(config, config.actor.data_path)
        self.held_out = prompt_dataset(config, self.ours.eval_data, True) if self.ours.eval_data else None
        tokenizer = load_tokenizer(info)
        self.advantages = Advantages(config, self.algorithm)
        self.groups = groups = Groups(config, self.algorithm, info.vocab_size)  # from here on there are actors
        self.source = Source(config, self.algorithm, prompts, tokenizer, info.eos_id, groups.rollout, groups.rewards)
        self.steps = config.actor.train_iters
        self.done = self.saved = self.consumed = 0  # steps, those in a checkpoint, and the prompts that they took
        self.left = False  # before the last step, by a signal
        self.order, self.warned = prompts.order_settings(), False  # checkpoints carry them; a resumed run compares
        updates = config.actor.global_batch_size * self.rl.n_samples_per_prompt // self.rl.mini_batch_size
        # With a single update the policy is still the one that wrote the responses: the ratio is 1.
        self.needs_old = updates * self.rl.epochs > 1 or self.ours.rollout_correction != "none"
        self.ahead = not self.rl.blocking  # the engines write a step's responses while the one before is trained

    def run(self) -> None:
        """All steps; after the loss of a training rank, from the last checkpoint on; a signal ends it in order."""
        self.stop = Stop()
        self.groups.cluster.waiting = self.stop.at_once
        self.recover()
        self.log = Log(self.config, self.done)
        rows = read_history(self.log.history)
        self.evaluated = {int(row["iteration"]) for row in rows if not EVALUATION.isdisjoint(row)}
        while not self.left and (self.done < self.steps or self.evaluation_due()):
            try:
                self.advance()
            except Lost as error:
                self.recover(error)
        self.log.close()
        title = f"MiniMind {self.ours.algorithm}, {self.config.model}"
        write_report(Path(self.ours.output_dir), title, ("grpo/score/mean", *sorted(EVALUATION)), "reward.png")
        print(self.log.outcome(), flush=True)

    def advance(self) -> None:
        """An evaluation if it is due, else a step, which is then saved if that is due: before it is evaluated."""
        evaluation = self.evaluation_due()
        # What a checkpoint holds already is done again: there a signal need not wait.
        at_once = evaluation and self.saved == self.done
        with contextlib.nullcontext() if at_once else self.stop.later():
            if evaluation:
                self.evaluate()
            else:
                self.step(self.done + 1)
            asked = self.stop.asked
            self.save_if_due(asked)
        self.left = asked and self.done < self.steps

    def recover(self, loss: Lost | None = None) -> None:
        """`begin`, until it works; a loss of training ranks is counted."""
        while True:
            try:
                if loss is not None:
                    self.groups.restarts.another(loss)
                self.begin()
                return
            except Lost as error:
                loss = error

    def begin(self) -> None:
        """Start the training ranks from the last checkpoint, or the weights to begin with; the engines get them."""
        found = self.groups.start()
        state = found["state"] or {}
        self.done = self.saved = found["iteration"]
        self.advantages.load_state_dict(state.get("advantages", {}))
        self.source.go_to(state.get("consumed", 0))
        differing = list(sample_order.values_differ(state.get("order", {}), self.order))
        if differing and not self.warned:
            say(sample_order.warning(str(self.config.actor.save), differing))
            self.warned = True
        self.loading = self.groups.rollout.load(self.groups.actor.weights())
        self.loading.result()
        say(f"{self.config.model}: {self.ours.algorithm}, step {self.done} of {self.steps} is done")

    def step(self, number: int) -> None:
        """One step."""
        clock = Clock()
        with clock("rollout"):
            experience = self.rollouts(number)
        batch, metrics = experience.batch, dict[str, float]()
        # Begun here and waited for below: verifiers run beside the forward passes. Some responses are scored already.
        scored = self.source.score(experience) if batch.rewards is None else None
        if self.algorithm.kl != "none":
            with clock("reference_model"):
                reference = self.groups.reference or self.groups.actor
                batch.ref_logp = reference.measure(batch, reference=True)["logp"]
        if self.ahead:  # what wrote the responses is a step old: the ratio is taken to its own log-probabilities
            batch.old_logp = batch.rollout_logp
        elif self.needs_old:
            with clock("old_log_p"):
                batch.old_logp = self.groups.actor.measure(batch)["logp"]
        if self.groups.critic:
            with clock("critic_values"):
                batch.values = self.groups.critic.measure(batch)["values"]
        with clock("rule_reward"):
            if scored is not None:
                scored()
        with clock("adv"):
            metrics |= self.advantages.fill(batch)
        with clock("update"):
            for group in self.groups.training():
                metrics |= group.update(batch, number, self.advantages.kl_coef)
        if batch.old_logp is not None and not self.ahead:  # without old_log_p the update has measured it
            metrics |= difference(batch, batch.old_logp)
        if not self.ours.replay_rollouts:  # saved responses may be of other weights
            require_same_model(metrics, self.ours.precision)
        with clock("resharding_to_infer"):
            self.sync(number)
        self.done, self.consumed = number, experience.consumed
        self.groups.finished(number)
        self.report(experience, {**clock.row(), **metrics})

    def rollouts(self, number: int) -> Experience:
        """The step's responses; one step ahead the engines then go on with the next prompts."""
        if self.ours.replay_rollouts:
            return experiences.replayed(Path(self.ours.replay_rollouts), number, self.rl.n_samples_per_prompt)
        if self.algorithm.dynamic_sampling:
            return self.source.take_differing()
        experience = self.source.take()
        if self.ahead and number < self.steps:
            self.source.begin()
        return experience

    def sync(self, number: int) -> None:
        """Hand the weights to the engines; every so many steps check that they then have them."""
        self.loading.result()
        self.loading = self.groups.rollout.load(self.groups.actor.weights())
        if not self.ahead:
            self.loading.result()
        if self.ours.weight_check_interval and number % self.ours.weight_check_interval == 0:
            if wrong := self.groups.rollout.check():
                raise RuntimeError(f"weight sync: {len(wrong)} tensors are not restored: {', '.join(wrong[:4])}")
            say(f"weights of the rollout engines checked at step {number}: spoilt, sent again, equal")

    def report(self, experience: Experience, row: Row) -> None:
        """Metrics and samples of a step."""
        family = {"dapo": "dapo", "ppo": "ppo"}.get(self.ours.algorithm, "grpo")
        batch = experience.batch
        row |= {**data_metrics(family, batch), **experience.metrics}
        if family != "grpo":
            row |= data_metrics("grpo", batch)
        row |= throughput(batch, row, devices(self.rl, "actor"), self.rl.log_max_throughput)
        self.log.step(self.done, row)
        for failure in experience.failures:
            say(f"a response could not be scored: {failure}")
        if self.ours.save_rollouts:
            folder = Path(self.ours.save_rollouts)
            experiences.save(experience, folder, self.done, self.rl.n_samples_per_prompt)
        if self.ours.sample_interval and self.done % self.ours.sample_interval == 0:
            assert batch.rewards is not None
            shown = [
                {**text, "reward": f"{r:.2f}"}
                for text, r in zip(experience.texts[:4], batch.rewards.tolist(), strict=False)
            ]
            print(table(shown, {"reward": 6, "label": 10, "prompt": 40, "response": 60}), flush=True)

    def evaluation_due(self) -> bool:
        """Whether there is yet to be an evaluation of this step: before the first, after the last, between them."""
        every = self.ours.eval_interval
        due = self.done in (0, self.steps) or (every and self.done % every == 0)
        return bool(self.held_out is not None and due and self.done not in self.evaluated)

    def evaluate(self) -> None:
        """Accuracy, or score, on held-out questions."""
        assert self.held_out is not None
        self.loading.result()
        self.log.step(self.done, self.source.evaluate(self.held_out, self.ours.eval_prompts))
        self.evaluated.add(self.done)

    def save_if_due(self, asked: bool) -> None:
        """Write a checkpoint of this step every `save_interval` steps, after the last one, or when asked to."""
        actor = self.config.actor
        due = asked or self.done == self.steps or (actor.save_interval and self.done % actor.save_interval == 0)
        if not actor.save or not due or self.saved == self.done:
            return
        state = {"consumed": self.consumed, "advantages": self.advantages.state_dict(), "order": self.order}
        # The actor's last: what it has saved the critic has too, and `Groups.start` goes by the actor.
        for group in reversed(self.groups.training()):
            group.save(self.done, self.consumed, state)
        self.saved = self.done
