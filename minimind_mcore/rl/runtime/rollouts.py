"""Prompts in, scored responses out: what a step of training learns from.

`RolloutManager` runs in an actor (`workers/manager.py`). Two parts of it can be replaced by functions of the user:
`minimind.rollout_function` generates the responses (default: `generate`), `minimind.rollout_filter` chooses the groups
that are trained on. Rewards are named by `verifier_function` and `minimind.rewards`.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Protocol

import torch

from minimind_mcore.errors import UserError
from minimind_mcore.rl.algorithms.groups import Groups, select
from minimind_mcore.rl.algorithms.table import Algorithm
from minimind_mcore.rl.config.objective import sampling_batches
from minimind_mcore.rl.config.schema import Config
from minimind_mcore.rl.registry import imported
from minimind_mcore.rl.rewards.rewards import Scores
from minimind_mcore.rl.rewards.verifiers import VERIFIERS
from minimind_mcore.rl.runtime import batch as batches
from minimind_mcore.rl.runtime.data import PromptDataset, RLPrompt
from minimind_mcore.rl.runtime.engines.protocol import RolloutSamplingParams
from minimind_mcore.rl.runtime.experience import Experience, joined, rows_of
from minimind_mcore.rl.runtime.metrics import Row, say
from minimind_mcore.rl.runtime.trajectory import Trajectory
from minimind_mcore.rl.runtime.user_function import Stopwatch, limited

OWN_RIGHT = 1.0  # least score of a right response, of a user's function
_SHOWN = 3  # failures shown of a step that took several batches
PART_BITS = 48  # of a seed: below them the number of the response, above them the number of its segment
EVALUATION_BIT = 63  # of a seed: set for responses to held-out prompts, which share no random numbers with training
RUN_BITS = 64  # of a seed: above them the seed of the run


class Workers(Protocol):
    """Actors that share calls; `supervise.Workers` is the one of Ray."""

    def __len__(self) -> int: ...

    def run(self, method: str, parts: Sequence[tuple[Any, ...]]) -> list[Any]:
        """What a method returns for the arguments of each part."""
        ...


class Engines:
    """All rollout engines: `generate` continues trajectories, token ids in and token ids out.

    Args:
        workers: `RolloutWorker`s.
        batch: responses that an engine generates at a time.
        length: `seq_length`, the most tokens of a prompt and its response.
    """

    def __init__(self, workers: Workers, batch: int, length: int) -> None:
        self.workers, self.batch, self.length = workers, batch, length
        self.watch = Stopwatch()  # of a user's function; the engines have deadlines of their own

    def remaining_tokens(self, trajectory: Trajectory) -> int:
        """Return the number of tokens that `seq_length` leaves after the context of a trajectory."""
        return self.length - trajectory.length

    def require_remaining_tokens(self, trajectories: Sequence[Trajectory], tokens: int) -> None:
        """Check that `seq_length` leaves at least `tokens` tokens after each context.

        Raises:
            UserError: it does not. Only what a user's function appends can be so long.
        """
        remaining = min(map(self.remaining_tokens, trajectories))
        if remaining < tokens:
            raise UserError(
                f"minimind.rollout_function: a prompt and its response have {self.length - remaining} tokens; expected "
                f"at most {self.length - tokens} (seq_length {self.length}). Before you append to a trajectory look at "
                "engines.remaining_tokens(trajectory), shorten what the environment says, or raise "
                "megatron_training.seq_length"
            )

    def generate(self, trajectories: Sequence[Trajectory], sampling: RolloutSamplingParams) -> None:
        """Append one segment of the policy to each trajectory. Responses to the same prompt are neighbours.

        A segment ends where prompt and response have `seq_length` tokens.

        Raises:
            UserError: a context leaves no room for a token.
        """
        if not trajectories:
            return
        with self.watch.paused():
            self._generate(trajectories, sampling)

    def _generate(self, trajectories: Sequence[Trajectory], sampling: RolloutSamplingParams) -> None:
        self.require_remaining_tokens(trajectories, 1)
        longest = min(sampling.max_tokens, max(map(self.remaining_tokens, trajectories)))
        sampling = dataclasses.replace(sampling, max_tokens=longest)
        groups = [list(group) for _, group in groupby(trajectories, key=_context_key)]
        n = min(map(len, groups))
        if n < max(map(len, groups)):
            groups, n = [[trajectory] for trajectory in trajectories], 1
        calls = self._calls(groups, max(1, self.batch // n))
        parts = [
            ([g[0].context.tolist() for g in some], n, sampling, [_seed(t) for g in some for t in g]) for some in calls
        ]
        for some, responses in zip(calls, self.workers.run("generate", parts), strict=True):
            for trajectory, response in zip((t for g in some for t in g), responses, strict=True):
                trajectory.append_response(response.first(self.remaining_tokens(trajectory), trajectory.length))

    def _calls(self, groups: list[list[Trajectory]], at_a_time: int) -> list[list[list[Trajectory]]]:
        """What engines do in one call: an equal share each, or where that is too much whatever fits into a batch."""
        if len(groups) <= at_a_time * len(self.workers):
            return [groups[i :: len(self.workers)] for i in range(min(len(self.workers), len(groups)))]
        ordered = sorted(groups, key=lambda group: group[0].length)  # little padding
        return [ordered[i : i + at_a_time] for i in range(0, len(ordered), at_a_time)]


def _context_key(trajectory: Trajectory) -> tuple[int, int]:
    """Equal for neighbours that have the same context."""
    return id(trajectory.prompt), id(trajectory) if trajectory.segments else 0


def _seed(trajectory: Trajectory) -> int:
    return trajectory.seed + (len(trajectory.segments) << PART_BITS)


def generate(trajectories: Sequence[Trajectory], engines: Engines, sampling: RolloutSamplingParams) -> None:
    """Generate one turn. A function of `minimind.rollout_function` has the same arguments.

    For several turns it calls `engines.generate` again for the trajectories that go on, after
    `trajectory.append_observation(turns(messages))` with a `turns.TurnRenderer`.
    `engines.remaining_tokens(trajectory)` is the number of tokens that still fit. Outside of `engines.generate` a
    function may take `minimind.actor_timeout_s` seconds at a time.
    """
    engines.generate(trajectories, sampling)


@dataclass(frozen=True)
class Position:
    """A place in the data.

    Attributes:
        consumed: prompts that are taken.
        carried: numbers of those among them whose responses are not trained on yet.
    """

    consumed: int = 0
    carried: tuple[int, ...] = ()


class RolloutManager:
    """Owns prompts, decoding, rewards and trajectories.

    Args:
        config: of the run.
        algorithm: what is optimised.
        prompts: to take, in their order.
        tokenizer: of transformers.
        stop: ids that end a response.
        engines: `RolloutWorker`s.
        rewards: `RewardWorker`s.
    """

    def __init__(
        self,
        config: Config,
        algorithm: Algorithm,
        prompts: PromptDataset,
        tokenizer: Any,
        stop: int,
        engines: Workers,
        rewards: Workers,
    ) -> None:
        self.config, self.algorithm, self.prompts, self.tokenizer = config, algorithm, prompts, tokenizer
        self.engines = Engines(engines, config.generate.max_num_seqs, config.actor.seq_length)
        self.rewards = rewards
        self.n, self.size = config.rl.n_samples_per_prompt, config.actor.global_batch_size
        ours, sampling = config.minimind, config.generate.sampling_config
        self.rollout_function: Callable[..., None] = generate
        if ours.rollout_function:
            self.rollout_function = self._own("minimind.rollout_function", ours.rollout_function)
        self.filter: Callable[..., Any] | None = None
        if ours.rollout_filter:
            self.filter = self._own("minimind.rollout_filter", ours.rollout_filter)
        self.sampling = RolloutSamplingParams(
            max_tokens=sampling.max_tokens,
            temperature=float(sampling.temperature),
            top_k=sampling.top_k,
            top_p=float(sampling.top_p),
            min_p=float(sampling.min_p),
            stop=(stop,),
        )
        self.said: set[str] = set()
        self.go_to(Position())

    def _say_once(self, text: str) -> None:
        if text not in self.said:
            self.said.add(text)
            say(text)

    def _own(self, key: str, path: str) -> Callable[..., Any]:
        """A function of the user with its time limit."""
        return limited(imported(path, key), key, path, self.config.minimind.actor_timeout_s, self.engines.watch)

    # ------------------------------------------------------------------------------------------------ prompts

    def go_to(self, position: Position) -> None:
        """Go on behind the prompts that are consumed, with those that are carried."""
        self.consumed = position.consumed
        self.stream = self.prompts.batches(1, start=position.consumed)
        self.open: list[list[Trajectory]] = []  # groups with responses that are not complete
        self.ready: list[list[Trajectory]] = []  # complete groups that no step has taken
        for number in position.carried:
            self.open.append(self._group(number, next(self.prompts.batches(1, start=number))[0]))

    @property
    def position(self) -> Position:
        """Where the next step goes on."""
        groups = [*self.ready, *self.open]
        base = self.config.actor.seed << RUN_BITS
        return Position(self.consumed, tuple((group[0].seed - base) // self.n for group in groups))

    def _group(self, number: int, prompt: RLPrompt) -> list[Trajectory]:
        """Trajectories to a prompt, the `number`-th that is taken; the same number has the same seeds."""
        seed = (self.config.actor.seed << RUN_BITS) + number * self.n
        return [Trajectory(prompt, seed + k) for k in range(self.n)]

    def _fresh(self, count: int) -> list[list[Trajectory]]:
        first = self.consumed
        self.consumed += max(0, count)
        return [self._group(number, next(self.stream)[0]) for number in range(first, self.consumed)]

    # --------------------------------------------------------------------------------------------- generation

    def generate(self) -> Experience:
        """The responses of the next step, not yet scored."""
        if self.config.rl.partial_rollout_max_split > 1:
            groups = self._continued()
        else:
            # The run that wrote the checkpoint may have carried prompts, with another partial_rollout_max_split.
            groups, self.open = self.open[: self.size], self.open[self.size :]
            groups += self._fresh(self.size - len(groups))
            self.rollout_function([one for group in groups for one in group], self.engines, self.sampling)
        return self._experience([one for group in groups for one in group])

    def _continued(self) -> list[list[Trajectory]]:
        """Groups of complete responses. A call generates a part of a response; the rest is left to later steps.

        As in MindSpeed-RL the engines generate until there are enough complete groups. Unfinished responses are
        continued first, with the weights of that time.
        """
        most = self.sampling.max_tokens
        part = -(-most // self.config.rl.partial_rollout_max_split)
        while len(self.ready) < self.size:
            self.open += self._fresh(self.size - len(self.open))
            going = [one for group in self.open for one in group if not self._complete(one)]
            for limit in sorted({min(part, most - one.generated_tokens) for one in going}):
                some = [one for one in going if min(part, most - one.generated_tokens) == limit]
                self.rollout_function(some, self.engines, dataclasses.replace(self.sampling, max_tokens=limit))
            self.ready += [group for group in self.open if all(map(self._complete, group))]
            self.open = [group for group in self.open if not all(map(self._complete, group))]
        found, self.ready = self.ready[: self.size], self.ready[self.size :]
        return found

    def _complete(self, trajectory: Trajectory) -> bool:
        return trajectory.finished or trajectory.generated_tokens >= self.sampling.max_tokens

    def _experience(self, trajectories: list[Trajectory]) -> Experience:
        self.engines.require_remaining_tokens(trajectories, 0)
        prompts = [trajectory.prompt for trajectory in trajectories[:: self.n]]
        texts = self._texts(prompts, trajectories, self.n)
        messages = [_messages(trajectory.prompt) for trajectory in trajectories]
        more = self._more(prompts, self.n)
        position = self.position
        return Experience(
            batches.of(trajectories), texts, messages, position.consumed, more=more, carried=position.carried
        )

    def _texts(self, prompts: list[RLPrompt], trajectories: list[Trajectory], n: int) -> list[dict[str, Any]]:
        """Prompt, response, label and segments of each of the `n` responses to each prompt.

        Raises:
            UserError: a user's function left a prompt without a response.
        """
        asked = self.tokenizer.batch_decode([prompt.ids.tolist() for prompt in prompts])
        labels = self._column(prompts, "labels")
        for row, trajectory in enumerate(trajectories):
            if not trajectory.segments:
                raise UserError(
                    f"minimind.rollout_function: found a trajectory without a response to the prompt "
                    f"{asked[row // n][-200:]!r}; expected one of engines.generate. Call engines.generate for every "
                    "trajectory"
                )
        ids = [trajectory.ids.tolist() for trajectory in trajectories]
        responses = self.tokenizer.batch_decode(ids, skip_special_tokens=True)
        parts = [segment for trajectory in trajectories for segment in trajectory.segments]
        decoded = iter(self.tokenizer.batch_decode([part.ids.tolist() for part in parts], skip_special_tokens=True))
        return [
            {
                "prompt": asked[row // n],
                "response": responses[row],
                "label": labels[row // n],
                "segments": [
                    {
                        "source": segment.source,
                        "text": next(decoded),
                        "tokens": len(segment.ids),
                        "in_loss": bool(segment.mask.any()),
                    }
                    for segment in trajectory.segments
                ],
            }
            for row, trajectory in enumerate(trajectories)
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

    # ------------------------------------------------------------------------------------------------ rewards

    def score(self, experience: Experience) -> None:
        """Fill in rewards and metrics."""
        lengths = experience.batch.policy_lengths
        scores = self._scores(experience.texts, experience.messages, lengths, **experience.more)
        experience.batch.rewards = scores.total
        experience.scores, experience.failed = scores.by_verifier, scores.failures
        experience.failures = [str(failure) for failure in scores.samples]
        experience.metrics = experience.describe(self.n)

    def _scores(self, texts: list[dict[str, Any]], messages: list[Any], lengths: torch.Tensor, **more: Any) -> Scores:
        """Scores of responses; each reward worker takes a share."""
        size = -(-len(texts) // len(self.rewards))
        parts = []
        for start in range(0, len(texts), size):
            some = slice(start, start + size)
            rest = {name: _cut(value, some) for name, value in more.items()}
            parts.append(_task(texts[some], messages[some], lengths[some], **rest))
        return Scores.joined(self.rewards.run("score", parts))

    # -------------------------------------------------------------------------------------- dynamic sampling

    def generate_differing(self) -> Experience:
        """Scored responses of groups whose scores differ: prompts are drawn until there are enough (DAPO).

        After `filter_groups_max_batches` batches groups that do not differ fill the step. They are not `Batch.taught`.

        Raises:
            UserError: a user's filter has not kept enough groups by then. Those that it rejects have advantages.
        """
        most, wanted = sampling_batches(self.config), self.config.actor.global_batch_size
        kept: list[Experience] = []
        spare: list[Experience] = []
        dropped: Counter[str] = Counter()
        count = generated = 0
        while count < wanted and generated < most:
            generated += 1
            experience = self.generate()
            self.score(experience)
            groups = self._select(experience)
            dropped += groups.reasons
            rows = groups.rows(self.n)
            kept.append(rows_of(experience, rows))
            spare.append(rows_of(experience, ~rows))
            count += int(groups.keep.sum())
        if count < wanted and self.filter is not None:
            raise UserError(
                f"minimind.rollout_filter: {self.config.minimind.rollout_filter} kept {count} of {generated * wanted} "
                f"groups after {generated} batches; expected global_batch_size {wanted}. Set "
                "rl_config.filter_groups_max_batches higher, or keep more groups"
            )
        whole = joined([*kept, *reversed(spare)] if count < wanted else kept, wanted * self.n)
        for experience in kept:  # one for each batch, however few of its rows are kept
            whole.failed += experience.failed
            whole.failures = [*whole.failures, *experience.failures][:_SHOWN]
        if count < wanted:
            whole.batch.taught = (torch.arange(wanted * self.n) < count * self.n).float()
            say(
                f"dynamic sampling: {count} of {wanted} groups differ after {generated} batches "
                f"(filter_groups_max_batches); the others fill the step and are not trained on"
            )
        named = {f"group/dropped/{reason}": float(number) for reason, number in dropped.items()}
        whole.metrics = {**whole.describe(self.n), **named, "train/num_gen_batches": float(generated)}
        return whole

    def _select(self, experience: Experience) -> Groups:
        """The groups that differ in `filter_groups_metric`, which names a verifier; else in their rewards."""
        assert experience.batch.rewards is not None
        if self.filter is not None:
            keep = torch.as_tensor(self.filter(experience.batch.rewards, experience.scores, self.n)).bool()
            if keep.shape != (self.size,):
                raise UserError(
                    f"minimind.rollout_filter: {self.config.minimind.rollout_filter} returned the shape "
                    f"{tuple(keep.shape)}, expected ({self.size},), one value for each prompt"
                )
            return Groups(keep, Counter(filtered=int((~keep).sum())))
        name = self.config.rl.filter_groups_metric
        if name not in experience.scores:
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

        Right is what the first verifier accepts that tells right from wrong; a reward model does not. A user's function
        accepts a response with a score of `OWN_RIGHT` or more.
        """
        base = (self.config.actor.seed << RUN_BITS) + (1 << EVALUATION_BIT)
        found = [Trajectory(prompt, base + number * n + k) for number, prompt in enumerate(asked) for k in range(n)]
        self.rollout_function(found, self.engines, sampling)
        texts = self._texts(asked, found, n)
        lengths = torch.tensor([trajectory.generated_tokens for trajectory in found])
        messages = [_messages(trajectory.prompt) for trajectory in found]
        scores = self._scores(texts, messages, lengths, **self._more(asked, n), judge=False)
        for failure in scores.samples:
            say(f"a response to a held-out question could not be scored: {failure}")
        for name in self.config.reward_names:
            right = VERIFIERS[name].right if name in VERIFIERS else OWN_RIGHT
            if right is not None:
                self._say_once(f"eval/accuracy: a response is right if {name} gives it a score of {right:g} or more")
                return (scores.by_verifier[name] >= right).float().view(-1, n), True
        return scores.total.view(-1, n), False


def _task(texts: list[dict[str, Any]], messages: list[Any], lengths: torch.Tensor, **more: Any) -> tuple[Any, ...]:
    """Arguments of `RewardWorker.score`. Only the policy's text is scored, so that an environment earns nothing."""
    prompts, labels, turns = ([text[name] for text in texts] for name in ("prompt", "label", "segments"))
    responses = ["\n".join(part["text"] for part in some if part["source"] == "policy") for some in turns]
    return responses, labels, messages, {"lengths": lengths, "prompts": prompts, "turns": turns, **more}


def _cut(value: Any, some: slice) -> Any:
    """The same rows of each column of `Rewards.score`'s arguments."""
    if isinstance(value, dict):
        return {name: column[some] for name, column in value.items()}
    return value if isinstance(value, bool) else value[some]


def _messages(prompt: RLPrompt) -> list[dict[str, str]]:
    found: list[dict[str, str]] = prompt.record.get("messages") or []
    return found
