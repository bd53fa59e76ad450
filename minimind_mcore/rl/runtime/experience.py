"""The responses of a step with their rewards, and the files of saved rollouts.

`minimind.save_rollouts` writes one file per step. `minimind.replay_rollouts` reads these files instead of generating
responses, so that a step can be repeated with other code or in another layout. Next to each file, a JSON Lines file has
the same responses in readable form.
"""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from minimind_mcore.errors import UserError
from minimind_mcore.rl.algorithms.groups import statistics
from minimind_mcore.rl.algorithms.masked import masked_mean
from minimind_mcore.rl.rewards.rewards import Scores
from minimind_mcore.rl.runtime import batch as batches
from minimind_mcore.rl.runtime.batch import Batch
from minimind_mcore.rl.runtime.metrics import Row
from minimind_mcore.storage import atomic_file, atomic_write_text


@dataclass
class Experience:
    """The responses of a step.

    Attributes:
        batch: the tensors of the responses, with rewards.
        texts: prompts, responses, labels and `segments` of the responses, for verifiers and for the JSON Lines file.
        messages: the conversation before each response, if the data has conversations.
        consumed: number of prompts taken from the data so far, including those of this step.
        metrics: metrics of rewards and groups.
        failures: a few responses that a verifier could not score.
        scores: [rows] scores by verifier.
        failed: number of responses that each verifier could not score, among all responses generated for the step.
        carried: numbers of consumed prompts whose responses are not complete; see `rollouts.Position`.
        more: further arguments of `Rewards.score` that the data provides.
        weights: the step after which the engines received the weights that generated the responses. 0: the initial
            weights. None: unknown, for example for saved responses.
    """

    batch: Batch
    texts: list[dict[str, Any]]
    messages: list[list[dict[str, str]]]
    consumed: int
    metrics: Row = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    scores: dict[str, torch.Tensor] = field(default_factory=dict)
    failed: Counter[str] = field(default_factory=Counter)
    carried: tuple[int, ...] = ()
    more: dict[str, Any] = field(default_factory=dict)
    weights: int | None = None

    def describe(self, n: int) -> Row:
        """Return metrics: mean rewards, failures of verifiers, and statistics of the groups of `n` responses."""
        assert self.batch.rewards is not None
        scores = Scores(self.batch.rewards, self.scores, self.failed)
        return {**scores.metrics(), **statistics(self.batch.rewards, n)}


def rows_of(experience: Experience, rows: torch.Tensor) -> Experience:
    """Return the experience of the responses that `rows`, a bool mask over the rows of the batch, selects."""
    numbers = rows.nonzero().flatten().tolist()
    return dataclasses.replace(
        experience,
        batch=experience.batch.select(rows) if numbers else experience.batch,
        texts=[experience.texts[row] for row in numbers],
        messages=[experience.messages[row] for row in numbers],
        scores={name: values[rows] for name, values in experience.scores.items()},
    )


def joined(parts: list[Experience], rows: int) -> Experience:
    """Concatenate experiences, and return the first `rows` rows."""
    last, parts = max(parts, key=lambda part: part.consumed), [part for part in parts if part.texts]
    batch = batches.concat([part.batch for part in parts]).select(torch.arange(rows))
    texts = [text for part in parts for text in part.texts][:rows]
    scores = {name: torch.cat([part.scores[name] for part in parts])[:rows] for name in parts[0].scores}
    return Experience(batch, texts, [], last.consumed, scores=scores, carried=last.carried)


# ------------------------------------------------------------------------------------------------- files


def save(experience: Experience, folder: Path, iteration: int, n: int) -> None:
    """Write a step's experience, with `n` responses to each prompt: a file for `replayed`, and a JSON Lines file."""
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
    """Yield each response of a step for the JSON Lines file: texts, rewards, mean advantage of its tokens, lengths.

    `segments` has the source, the text and the number of tokens of each segment, and whether it is in the loss.
    """
    batch = experience.batch
    taught = [True] * len(batch) if batch.taught is None else batch.taught.bool().tolist()
    columns = {"prompt_tokens": batch.prompt_lengths, "response_tokens": batch.policy_lengths}
    columns |= {"finished": batch.finished}
    if batch.rewards is not None:
        columns["reward"] = batch.rewards
    if batch.advantages is not None:
        columns["advantage"] = masked_mean(batch.advantages, batch.mask, dim=1)
    values = {name: column.tolist() for name, column in columns.items()}
    parts = {name: scores.tolist() for name, scores in experience.scores.items()}
    for row, text in enumerate(experience.texts):
        own = {name: column[row] for name, column in values.items()}
        if "segments" in text:  # older files have none
            own["segments"] = [one | {"in_loss": one["in_loss"] and taught[row]} for one in text["segments"]]
        yield {"step": iteration, **text, **own, "rewards": {name: scores[row] for name, scores in parts.items()}}


def replayed(folder: Path, iteration: int, n: int, prompts: int | None = None) -> Experience:
    """Read a step's experience from the file of `save`.

    Args:
        folder: directory of the file.
        iteration: number of the step.
        n: number of responses to each prompt.
        prompts: number of prompts of a step. None: any number.

    Raises:
        UserError: the file does not exist, or has another number of prompts or responses.
    """
    path = folder / f"rollouts-{iteration:07d}.pt"
    if not path.is_file():
        raise UserError(f"{path} is not there; minimind.replay_rollouts expects a file of every step")
    found = torch.load(path, weights_only=True)
    columns = found["batch"]
    if "mask" not in columns:  # older files: the policy generated every token
        columns["mask"] = batches.padded([[1] * length for length in columns["response_lengths"].tolist()], np.float32)
    batch = Batch(**columns)
    written = found.get("n_samples_per_prompt", n)  # older files do not say
    if written != n or len(batch) % n:
        what = f"{written} responses to each prompt" if written != n else f"{len(batch)} responses, no multiple of {n}"
        raise UserError(
            f"{path}: found {what}, expected {n} to each prompt (rl_config.n_samples_per_prompt); use the "
            "value of the run that wrote the rollouts"
        )
    # The number of updates of a step, and whether it needs old log-probabilities, follow from global_batch_size.
    if prompts is not None and len(batch) != prompts * n:
        raise UserError(
            f"{path}: found responses to {len(batch) // n} prompts, expected {prompts} "
            "(megatron_training.global_batch_size); use the value of the run that wrote the rollouts"
        )
    return Experience(batch, found["texts"], [], found["consumed"], found["metrics"])
