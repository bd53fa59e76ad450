"""Prompts in, scored responses out: what a step of training learns from.

Saved rollouts (`minimind.save_rollouts`) are one file a step; `minimind.replay_rollouts` reads them in place of
generating, so that a step can be done again with other code, or in another layout. Next to each file a file of JSON
lines has the same responses for people.
"""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from minimind_mcore.errors import UserError
from minimind_mcore.rl.algorithms.groups import Groups, select, statistics
from minimind_mcore.rl.algorithms.masked import masked_mean
from minimind_mcore.rl.algorithms.table import Algorithm
from minimind_mcore.rl.config.schema import Config
from minimind_mcore.rl.rewards.rewards import Scores
from minimind_mcore.rl.rewards.verifiers import VERIFIERS
from minimind_mcore.rl.runtime import batch as batches
from minimind_mcore.rl.runtime.batch import Batch
from minimind_mcore.rl.runtime.data import PromptDataset, RLPrompt
from minimind_mcore.rl.runtime.engines.protocol import RolloutSamplingParams
from minimind_mcore.rl.runtime.metrics import Row, say
from minimind_mcore.rl.runtime.supervise import ActorPool
from minimind_mcore.rl.runtime.workers.rollout import RolloutGroup
from minimind_mcore.storage import atomic_file, atomic_write_text

_SHOWN = 3  # failures shown of a step that took several batches


@dataclass
class Experience:
    """The responses of a step.

    Attributes:
        batch: with rewards.
        texts: prompts, responses and labels, for people.
        messages: the conversation before each response, where the data has it.
        consumed: prompts taken from the data so far, these among them.
        metrics: of rewards and groups.
        failures: a few responses that a verifier could not score.
        scores: of each verifier.
        failed: how many responses each verifier could not score, of all that were written for the step.
        more: what else the data has for the rewards, see `Rewards.score`.
    """

    batch: Batch
    texts: list[dict[str, str]]
    messages: list[list[dict[str, str]]]
    consumed: int
    metrics: Row = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    scores: dict[str, torch.Tensor] = field(default_factory=dict)
    failed: Counter[str] = field(default_factory=Counter)
    more: dict[str, Any] = field(default_factory=dict)

    def describe(self, n: int) -> Row:
        """Means of the rewards, failures, and statistics of the groups of `n` responses."""
        assert self.batch.rewards is not None
        scores = Scores(self.batch.rewards, self.scores, self.failed)
        return {**scores.metrics(), **statistics(self.batch.rewards, n)}


class RolloutManager:
    """Writes and scores responses.

    Args:
        config: of the run.
        algorithm: what is optimised.
        prompts: to take, in their order.
        tokenizer: of transformers.
        stop: ids that end a response.
        rollout: the engines.
        rewards: who scores.
    """

    def __init__(
        self,
        config: Config,
        algorithm: Algorithm,
        prompts: PromptDataset,
        tokenizer: Any,
        stop: int,
        rollout: RolloutGroup,
        rewards: ActorPool,
    ) -> None:
        self.config, self.algorithm, self.prompts, self.tokenizer = config, algorithm, prompts, tokenizer
        self.rollout, self.rewards = rollout, rewards
        self.n = config.rl.n_samples_per_prompt
        sampling = config.generate.sampling_config
        self.sampling = RolloutSamplingParams(
            max_tokens=sampling.max_tokens,
            temperature=float(sampling.temperature),
            top_k=sampling.top_k,
            top_p=float(sampling.top_p),
            min_p=float(sampling.min_p),
            stop=(stop,),
        )
        self.consumed = 0
        self.stream: Iterator[list[RLPrompt]] = iter(())
        self.pending: Callable[[], Experience] | None = None

    def go_to(self, consumed: int) -> None:
        """The next prompts are those behind the first `consumed`."""
        self.consumed, self.pending = consumed, None
        self.stream = self.prompts.batches(self.config.actor.global_batch_size, start=consumed)

    def begin(self) -> None:
        """Let the engines write the responses to the next prompts, with the weights that they have."""
        if self.pending is None:
            self.pending = self._write(next(self.stream))

    def generate(self) -> Experience:
        """The responses that were begun, not yet scored."""
        self.begin()
        assert self.pending is not None
        pending, self.pending = self.pending, None
        return pending()

    def _write(self, prompts: list[RLPrompt]) -> Callable[[], Experience]:
        first, seed = self.consumed, self.config.actor.seed
        self.consumed += len(prompts)
        consumed = self.consumed
        seeds = [(seed << 64) + (first + i) * self.n + k for i in range(len(prompts)) for k in range(self.n)]
        ids = [prompt.ids.tolist() for prompt in prompts]
        finish = self.rollout.generate(ids, self.n, self.sampling, seeds)

        def experience() -> Experience:
            found = finish()
            batch = batches.make(
                [prompt for prompt in ids for _ in range(self.n)],
                [response.ids for response in found],
                [response.logp for response in found],
                [response.finished for response in found],
                [prompt.index for prompt in prompts for _ in range(self.n)],
            )
            messages = [_messages(prompt) for prompt in prompts for _ in range(self.n)]
            texts = self._texts(prompts, batch.response_ids(), self.n)
            return Experience(batch, texts, messages, consumed, more=self._more(prompts, self.n))

        return experience

    def _texts(self, prompts: list[RLPrompt], ids: list[list[int]], n: int) -> list[dict[str, str]]:
        """Prompt, response and label of each of the `n` responses to each prompt."""
        responses = self.tokenizer.batch_decode(ids, skip_special_tokens=True)
        asked = self.tokenizer.batch_decode([prompt.ids.tolist() for prompt in prompts])
        labels = self._column(prompts, "labels")
        return [
            {"prompt": asked[row // n], "response": response, "label": labels[row // n]}
            for row, response in enumerate(responses)
        ]

    def _column(self, prompts: list[RLPrompt], name: str) -> list[str]:
        """A column of the data as text; "" where there is none."""
        ids = [list(prompt.columns.get(name, ())) for prompt in prompts]
        return [text.strip() for text in self.tokenizer.batch_decode(ids, skip_special_tokens=True)]

    def _more(self, prompts: list[RLPrompt], n: int) -> dict[str, Any]:
        """What the data has beside prompts and labels, for each of the `n` responses: see `Rewards.score`."""
        names = [name for name in prompts[0].columns if name != "labels"]
        columns = {name: [text for text in self._column(prompts, name) for _ in range(n)] for name in names}
        more: dict[str, Any] = {"columns": columns, "records": [prompt.record for prompt in prompts for _ in range(n)]}
        if "categories" in columns:
            first = [int(prompt.columns["categories"][0]) for prompt in prompts]  # an id, no text, as in MindSpeed-RL
            more["categories"] = [category for category in first for _ in range(n)]
        return more

    def score(self, experience: Experience) -> Callable[[], None]:
        """Begin to score; what is returned waits, and fills in rewards and metrics."""
        lengths = experience.batch.response_lengths
        task = self.rewards.submit("score", [_task(experience.texts, experience.messages, lengths, **experience.more)])

        def fill() -> None:
            (scores,) = task.result()
            experience.batch.rewards = scores.total
            experience.scores, experience.failed = scores.by_verifier, scores.failures
            experience.failures = [str(failure) for failure in scores.samples]
            experience.metrics = experience.describe(self.n)

        return fill

    # -------------------------------------------------------------------------------------- dynamic sampling

    def generate_differing(self) -> Experience:
        """Scored responses of groups whose scores differ: prompts are drawn until there are enough (DAPO).

        After `filter_groups_max_batches` batches the step is filled up with groups that do not.
        """
        rl, wanted = self.config.rl, self.config.actor.global_batch_size
        kept: list[Experience] = []
        spare: list[Experience] = []
        dropped: Counter[str] = Counter()
        count = generated = 0
        while count < wanted and generated < rl.filter_groups_max_batches:
            generated += 1
            experience = self.generate()
            self.score(experience)()
            groups = self._select(experience)
            dropped += groups.reasons
            rows = groups.rows(self.n)
            kept.append(_rows(experience, rows))
            spare.append(_rows(experience, ~rows))
            count += int(groups.keep.sum())
        whole = _joined([*kept, *reversed(spare)] if count < wanted else kept, wanted * self.n)
        for experience in kept:  # one for each batch, however few of its rows are kept
            whole.failed += experience.failed
            whole.failures = [*whole.failures, *experience.failures][:_SHOWN]
        if count < wanted:
            say(
                f"dynamic sampling: {count} of {wanted} groups differ after {generated} batches "
                f"(filter_groups_max_batches); the others of the step teach nothing"
            )
        named = {f"group/dropped/{reason}": float(number) for reason, number in dropped.items()}
        whole.metrics = {**whole.describe(self.n), **named, "train/num_gen_batches": float(generated)}
        return whole

    def _select(self, experience: Experience) -> Groups:
        """The groups that differ in `filter_groups_metric`, which names a verifier; else in their rewards."""
        name = self.config.rl.filter_groups_metric
        if name not in experience.scores:
            assert experience.batch.rewards is not None
            return select(experience.batch.rewards, self.n)
        verifier = VERIFIERS.get(name)
        right, wrong = (verifier.right, verifier.wrong) if verifier else (None, None)
        return select(experience.scores[name], self.n, right, wrong)

    # ------------------------------------------------------------------------------------------- held-out data

    def evaluate(self, prompts: PromptDataset, count: int, samples: int = 1) -> Row:
        """Answer the first `count` held-out questions, and return the share of right responses, or their mean score.

        The keys are `accuracy`, or `score` where no reward tells right from wrong, of the likeliest response. With
        `samples` k above 1 also the mean of k drawn responses (`avg@k`), and the share of questions with a right one
        among them (`pass@k`), or the mean of the best scores (`best@k`).
        """
        asked = [prompts[i] for i in range(min(count, len(prompts)))]
        greedy = dataclasses.replace(self.sampling, top_k=1, top_p=1.0, min_p=0.0)
        found, known = self._grade(asked, 1, greedy)
        row = {"accuracy" if known else "score": found.mean().item()}
        if samples > 1:
            drawn, _ = self._grade(asked, samples, self.sampling)
            row[f"avg@{samples}"] = drawn.mean().item()
            row[f"{'pass' if known else 'best'}@{samples}"] = drawn.amax(dim=1).mean().item()
        return row

    def _grade(self, asked: list[RLPrompt], n: int, sampling: RolloutSamplingParams) -> tuple[torch.Tensor, bool]:
        """[prompts, n] float32 of n responses to each prompt: 1 for a right one, and True; or the scores, and False.

        Right is what the first verifier accepts that tells right from wrong; a reward model does not.
        """
        ids, seeds = [prompt.ids.tolist() for prompt in asked], list(range(len(asked) * n))
        found = self.rollout.generate(ids, n, sampling, seeds)()
        texts = self._texts(asked, [response.ids for response in found], n)
        lengths = torch.tensor([len(response.ids) for response in found])
        messages = [_messages(prompt) for prompt in asked for _ in range(n)]
        (scores,) = self.rewards.run("score", [_task(texts, messages, lengths, **self._more(asked, n), judge=False)])
        for failure in scores.samples:
            say(f"a response to a held-out question could not be scored: {failure}")
        for name in self.config.reward_names:
            right = VERIFIERS[name].right if name in VERIFIERS else 1.0
            if right is not None:
                return (scores.by_verifier[name] >= right).float().view(-1, n), True
        return scores.total.view(-1, n), False


def _task(texts: list[dict[str, str]], messages: list[Any], lengths: torch.Tensor, **more: Any) -> tuple[Any, ...]:
    """Arguments of `RewardWorker.score`."""
    prompts, responses, labels = ([text[name] for text in texts] for name in ("prompt", "response", "label"))
    return responses, labels, messages, {"lengths": lengths, "prompts": prompts, **more}


def _messages(prompt: RLPrompt) -> list[dict[str, str]]:
    found: list[dict[str, str]] = prompt.record.get("messages") or []
    return found


def _rows(experience: Experience, rows: torch.Tensor) -> Experience:
    """Some of the rows [rows of the batch] bool."""
    numbers = rows.nonzero().flatten().tolist()
    return dataclasses.replace(
        experience,
        batch=experience.batch.select(rows) if numbers else experience.batch,
        texts=[experience.texts[row] for row in numbers],
        messages=[experience.messages[row] for row in numbers],
        scores={name: values[rows] for name, values in experience.scores.items()},
    )


def _joined(parts: list[Experience], rows: int) -> Experience:
    """The first so many rows of several."""
    consumed, parts = max(part.consumed for part in parts), [part for part in parts if part.texts]
    batch = batches.concat([part.batch for part in parts]).select(torch.arange(rows))
    texts = [text for part in parts for text in part.texts][:rows]
    scores = {name: torch.cat([part.scores[name] for part in parts])[:rows] for name in parts[0].scores}
    return Experience(batch, texts, [], consumed, scores=scores)


# ------------------------------------------------------------------------------------------------- files


def save(experience: Experience, folder: Path, iteration: int, n: int) -> None:
    """Write a step's experience, of `n` responses to each prompt, for `replayed`, and its trajectories."""
    lines = [json.dumps(trajectory, ensure_ascii=False) for trajectory in trajectories(experience, iteration)]
    atomic_write_text(folder / f"rollouts-{iteration:07d}.jsonl", "".join(f"{line}\n" for line in lines))
    with atomic_file(folder / f"rollouts-{iteration:07d}.pt") as file:
        torch.save(
            {
                "batch": experience.batch.state_dict(),
                "texts": experience.texts,
                "consumed": experience.consumed,
                "metrics": experience.metrics,
                "n_samples_per_prompt": n,
            },
            file,
        )


def trajectories(experience: Experience, iteration: int) -> Iterator[dict[str, Any]]:
    """Yield each response of a step, readable: texts, reward and its parts, mean advantage of its tokens, lengths."""
    batch = experience.batch
    columns = {"prompt_tokens": batch.prompt_lengths, "response_tokens": batch.response_lengths}
    columns |= {"finished": batch.finished}
    if batch.rewards is not None:
        columns["reward"] = batch.rewards
    if batch.advantages is not None:
        columns["advantage"] = masked_mean(batch.advantages, batch.mask, dim=1)
    values = {name: column.tolist() for name, column in columns.items()}
    parts = {name: scores.tolist() for name, scores in experience.scores.items()}
    for row, text in enumerate(experience.texts):
        own = {name: column[row] for name, column in values.items()}
        yield {"step": iteration, **text, **own, "rewards": {name: scores[row] for name, scores in parts.items()}}


def replayed(folder: Path, iteration: int, n: int) -> Experience:
    """A step's experience from its file.

    Raises:
        UserError: there is none, or it has not `n` responses to each prompt.
    """
    path = folder / f"rollouts-{iteration:07d}.pt"
    if not path.is_file():
        raise UserError(f"{path} is not there; minimind.replay_rollouts expects a file of every step")
    found = torch.load(path, weights_only=True)
    batch = Batch(**found["batch"])
    written = found.get("n_samples_per_prompt", n)  # older files do not say
    if written != n or len(batch) % n:
        what = f"{written} responses to each prompt" if written != n else f"{len(batch)} responses, no multiple of {n}"
        raise UserError(
            f"{path}: found {what}, expected {n} to each prompt (rl_config.n_samples_per_prompt); set what the "
            "rollouts were written with"
        )
    return Experience(batch, found["texts"], [], found["consumed"], found["metrics"])
