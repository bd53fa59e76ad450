"""From prompts to scored responses: the driver's part, with an engine and a reward actor of this process."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import rl_trees
from engine import Corpus
from transformers import AutoTokenizer

from minimind_mcore.errors import UserError
from minimind_mcore.preprocess.convert import convert
from minimind_mcore.preprocess.options import ChatOptions, Options
from minimind_mcore.rl import plan
from minimind_mcore.rl.config import Config, resolve
from minimind_mcore.rl.experience import Source
from minimind_mcore.rl.objective import objective
from minimind_mcore.rl.rollout.engine import Response
from minimind_mcore.rl.trainer import prompt_dataset
from minimind_mcore.rl.workers.reward import RewardWorker

QUESTIONS = ["how are you", "what is this", "one two", "three four"]


@pytest.fixture
def rlaif(corpus: Corpus, tmp_path: Path) -> Path:
    """The prefix of MiniMind's own questions, which have no answers."""
    source = tmp_path / "rlaif.jsonl"
    ends = {"role": "assistant", "content": "无"}
    talks = [{"conversations": [{"role": "user", "content": text}, ends]} for text in QUESTIONS]
    source.write_text("".join(json.dumps(talk) + "\n" for talk in talks))
    chat = ChatOptions(prompt_type="chatml_de")
    prefix = tmp_path / "rlaif"
    convert(Options(str(source), str(corpus.tokenizer), str(prefix), handler="MiniMindPromptHandler", chat=chat))
    return prefix


def configured(corpus: Corpus, prefix: Path, verifiers: list[str], **sections: dict[str, Any]) -> Config:
    """A run on the prompts of a prefix; what is given goes into its sections."""
    tree = rl_trees.run_tree(corpus, prefix, prefix.parent / "run")
    tree["rl_config"] |= {"verifier_function": verifiers, "verifier_weight": [1.0] * len(verifiers)}
    for name, section in sections.items():
        tree[name] |= section
    return resolve(tree)


def source_of(config: Config, answer: Callable[[int], str]) -> Source:
    """Writes `answer(number of the response)`."""
    tokenizer = AutoTokenizer.from_pretrained(config.actor.tokenizer_name_or_path)
    worker = RewardWorker(config)
    written = 0

    def generate(prompts: list[list[int]], n: int, *_: Any) -> Callable[[], list[Response]]:
        nonlocal written
        texts = [answer(written + row) for row in range(len(prompts) * n)]
        written += len(texts)
        ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
        return lambda: [Response(row, [-1.0] * len(row), True) for row in ids]

    def run(method: str, parts: list[Any]) -> list[Any]:
        return [getattr(worker, method)(*parts[0])]

    rewards: Any = SimpleNamespace(run=run, submit=lambda *task: SimpleNamespace(result=lambda: run(*task)))
    engines: Any = SimpleNamespace(generate=generate)
    prompts = prompt_dataset(config, config.actor.data_path)
    source = Source(config, objective(config), prompts, tokenizer, 0, engines, rewards)
    source.go_to(0)
    return source


def test_questions_without_answers_are_scored_by_what_needs_none(corpus: Corpus, rlaif: Path) -> None:
    config = configured(corpus, rlaif, ["minimind_shape"], megatron_training={"dataset_additional_keys": []})
    source = source_of(config, lambda row: "a" * (5 if row % 2 else 30))
    experience = source.take()
    source.score(experience)()
    assert {text["label"] for text in experience.texts} == {""}
    assert experience.batch.rewards is not None and experience.batch.rewards.tolist() == [0.5, -0.5] * 8
    assert source.accuracy(source.prompts, 2) == 0.0
    plan.show(config, pending=False)


def test_a_verifier_that_compares_with_a_label_needs_one(corpus: Corpus, rlaif: Path, tmp_path: Path) -> None:
    bare = configured(corpus, rlaif, ["minimind_shape", "acc"])
    with pytest.raises(
        UserError, match=r"rlaif: these prompts have no labels, which acc \(verifier_function\) compare"
    ):
        plan.show(bare, pending=False)
    asked = configured(corpus, rlaif, ["minimind_shape"], megatron_training={"dataset_additional_keys": ["labels"]})
    with pytest.raises(UserError, match="no column labels"):
        prompt_dataset(asked, asked.actor.data_path)
    labelled = configured(corpus, rl_trees.write_prompts(tmp_path / "sums"), ["acc"])
    assert prompt_dataset(labelled, labelled.actor.data_path).columns == ["labels"]


@pytest.mark.parametrize(("split", "count"), [(None, 12), ("100,0,0", 12), ("75,25,0", 9), ("1/1/1", 4)])
def test_the_first_part_of_the_split_is_trained_on(corpus: Corpus, tmp_path: Path, split: str, count: int) -> None:
    prefix = rl_trees.write_prompts(tmp_path / "sums")
    config = configured(corpus, prefix, ["format"], megatron_training={"split": split})
    assert len(prompt_dataset(config, str(prefix))) == count
    assert len(prompt_dataset(config, str(prefix), held_out=True)) == 12
