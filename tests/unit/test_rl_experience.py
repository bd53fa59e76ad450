"""From prompts to scored responses: the driver's part, with an engine and a reward actor of this process."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from helpers import rl_trees
from helpers.engine import Corpus
from helpers.rl_local import LocalWorkers
from transformers import AutoTokenizer

from minimind_mcore.errors import UserError
from minimind_mcore.preprocess.convert import convert
from minimind_mcore.preprocess.indexed import IndexedWriter
from minimind_mcore.preprocess.options import ChatOptions, Options
from minimind_mcore.rl.config.lint import check
from minimind_mcore.rl.config.load import resolve
from minimind_mcore.rl.config.objective import objective
from minimind_mcore.rl.config.schema import Config
from minimind_mcore.rl.rewards.rewards import Rewards
from minimind_mcore.rl.runtime import dry_run
from minimind_mcore.rl.runtime.advantages import Advantages
from minimind_mcore.rl.runtime.data import PromptDataset, prompt_dataset
from minimind_mcore.rl.runtime.engines.protocol import Response
from minimind_mcore.rl.runtime.experience import trajectories
from minimind_mcore.rl.runtime.rollouts import RolloutManager, _task
from minimind_mcore.rl.runtime.supervise import Lost
from minimind_mcore.rl.runtime.trainer import Trainer, train
from minimind_mcore.rl.runtime.trajectory import Trajectory
from minimind_mcore.rl.runtime.workers.reward import RewardWorker
from minimind_mcore.training.metrics import read_history

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


def source_of(config: Config, answer: Callable[[int], str], model: Any = None) -> RolloutManager:
    """Writes `answer(number of the response)`; `model` takes the place of a reward model."""
    tokenizer = AutoTokenizer.from_pretrained(config.actor.tokenizer_name_or_path)
    worker = RewardWorker(config)
    if model is not None:
        worker.rewards = Rewards([], [], model=model)
    written = 0

    def generate(prompts: list[list[int]], n: int, *_: Any) -> list[Response]:
        nonlocal written
        texts = [answer(written + row) for row in range(len(prompts) * n)]
        written += len(texts)
        ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
        return [Response(np.array(row, np.int32), np.full(len(row), -1.0, np.float32), True) for row in ids]

    prompts = prompt_dataset(config, config.actor.data_path)
    engines = LocalWorkers(SimpleNamespace(generate=generate))
    return RolloutManager(config, objective(config), prompts, tokenizer, 0, engines, LocalWorkers(worker))


def test_questions_without_answers_are_scored_by_what_needs_none(corpus: Corpus, rlaif: Path) -> None:
    config = configured(corpus, rlaif, ["minimind_shape"], megatron_training={"dataset_additional_keys": []})
    source = source_of(config, lambda row: "a" * (5 if row % 2 else 30))
    experience = source.generate()
    source.score(experience)
    assert {text["label"] for text in experience.texts} == {""}
    assert experience.batch.rewards is not None and experience.batch.rewards.tolist() == [0.5, -0.5] * 8
    assert source.evaluate(source.prompts, 2) == {"score": 0.0}  # nobody says what is right
    dry_run.print_plan(config, pending=False)


def test_a_verifier_that_compares_with_a_label_needs_one(corpus: Corpus, rlaif: Path, tmp_path: Path) -> None:
    bare = configured(corpus, rlaif, ["minimind_shape", "acc"])
    with pytest.raises(
        UserError, match=r"rlaif: these prompts have no labels, which acc \(verifier_function\) compare"
    ):
        dry_run.print_plan(bare, pending=False)
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


# Evaluation

MINE = """
def asked(response, label, prompt, length, **context):
    return float(prompt.startswith("<|im_start|>user") and length == 1)

def graded(response, label, level, **context):
    return len(level)

def lettered(response, label, **context):
    if response == "c":
        raise ValueError("no c")
    return float(response == "a")

def letter(response, label, **context):
    return float(response == "a")

def boxed(response, label, **context):
    return float("42" in response)

def told(response, label, turns, **context):
    return float("42" in turns[1]["text"]) + sum(turn["tokens"] for turn in turns if turn["source"] == "environment")

def fails(response, label, **context):
    raise ValueError(response)
"""


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module with rewards of the user's."""
    (tmp_path / "my_evaluated.py").write_text(MINE)
    monkeypatch.syspath_prepend(tmp_path)
    return "my_evaluated"


def test_the_evaluation_has_prompts_and_its_failures_end_no_run(
    corpus: Corpus, rlaif: Path, mine: str, capsys: pytest.CaptureFixture[str]
) -> None:
    config = configured(corpus, rlaif, [f"{mine}:asked", f"{mine}:fails"], minimind={"reward_failure_limit": 0.0})
    source = source_of(config, lambda row: "a" if row < 3 else "a a")
    assert source.evaluate(source.prompts, 4) == {"accuracy": 0.75}
    source.evaluate(source.prompts, 4)
    out = capsys.readouterr().out
    assert "my_evaluated:fails: ValueError: a; label ''" in out
    assert out.count("a response is right if my_evaluated:asked gives it a score of 1 or more") == 1
    experience = source.generate()
    with pytest.raises(UserError, match="could not score 16 of the last 16 responses"):
        source.score(experience)


def test_rewards_get_every_column_and_categories_gate_the_rules(corpus: Corpus, mine: str, tmp_path: Path) -> None:
    prefix = rl_trees.write_prompts(tmp_path / "sums", 4)
    texts = ["easy", "very hard", "x", "hard"]
    tokenizer = AutoTokenizer.from_pretrained(corpus.tokenizer)
    for name, rows in (("level", tokenizer(texts)["input_ids"]), ("categories", [[1], [0], [0], [1]])):
        with IndexedWriter(f"{prefix}_packed_{name}_document") as writer:
            writer.add(np.concatenate(rows), np.array([len(row) for row in rows]))
    keys = {"dataset_additional_keys": ["labels", "level", "categories"], "no_shuffle": True}
    source = source_of(configured(corpus, prefix, [f"{mine}:graded"], megatron_training=keys), lambda row: "a")
    experience = source.generate()
    source.score(experience)
    expected = [len(text) * (place in (0, 3)) for place, text in enumerate(texts)]
    assert experience.batch.rewards is not None
    assert experience.batch.rewards.view(4, -1).tolist() == [[float(value)] * 4 for value in expected]
    with pytest.raises(UserError, match="missing a required argument: 'level'"):
        dry_run.print_plan(configured(corpus, prefix, [f"{mine}:graded"]), pending=False)


def test_a_reward_model_alone_gives_scores_and_no_accuracy(corpus: Corpus, rlaif: Path) -> None:
    judge = SimpleNamespace(score=lambda talks, responses: torch.tensor([2.5, 0.25, len(talks), -0.75]))
    source = source_of(configured(corpus, rlaif, []), lambda row: "a", judge)
    assert source.evaluate(source.prompts, 4) == {"score": 1.5}


def test_drawn_responses_give_avg_and_pass_at_k(corpus: Corpus, rlaif: Path, mine: str) -> None:
    """Of four prompts: 1 likeliest response right; of three drawn ones 0, 1, 2 and 3 right."""
    responses = "a b b b" + " b b b" + " b a b" + " a b a" + " a a a"
    config = configured(corpus, rlaif, [f"{mine}:letter"])
    source = source_of(config, lambda row: responses.split()[row])
    assert source.evaluate(source.prompts, 4, 3) == {
        "accuracy": 0.25, "avg@3": pytest.approx(6 / 12), "pass@3": pytest.approx(3 / 4),
    }  # fmt: skip
    shape = configured(corpus, rlaif, ["minimind_shape"])
    source = source_of(shape, lambda row: "a" * (30 if row % 2 else 5))  # scores 0.5 and -0.5
    assert source.evaluate(source.prompts, 2, 2) == {"score": 0.0, "avg@2": 0.0, "best@2": 0.5}


def test_every_set_of_held_out_prompts_is_measured_and_the_first_is_the_headline(corpus: Corpus, rlaif: Path) -> None:
    assert configured(corpus, rlaif, [], minimind={"eval_data": "a/x"}).minimind.eval_data == ("a/x",)
    sets = configured(corpus, rlaif, ["minimind_shape"], minimind={"eval_data": ["a/sums", "b/words"]})
    assert sets.minimind.eval_data == ("a/sums", "b/words")
    trainer = Rehearsal(sets, 0, [], [lambda: 0.25, lambda: 0.75])
    trainer.held_out = {"sums": cast(PromptDataset, []), "words": cast(PromptDataset, [])}
    trainer.start()
    trainer.evaluate()
    [row] = read_history(Path(sets.minimind.output_dir) / "metrics.jsonl")
    assert row == {"iteration": 0, "eval/accuracy": 0.25, "eval/sums/accuracy": 0.25, "eval/words/accuracy": 0.75}
    twice = check(dict(sets.tree) | {"minimind": {**sets.tree["minimind"], "eval_data": ["a/x", "b/x"]}}, "embedded")
    assert [f.key for f in twice if f.level == "error" and "2 sets called x" in f.message] == ["minimind.eval_data"]


class Rehearsal(Trainer):
    """A trainer whose steps and checkpoints are words."""

    def __init__(self, config: Config, done: int, told: list[str], accuracy: list[Callable[[], float]]) -> None:
        self.config, self.minimind, self.steps, self.told, self.left = config, config.minimind, 4, told, False
        self.done = self.saved = done
        self.state, self.held_out = {"consumed": 0}, {"unseen": cast(PromptDataset, [])}
        self.order: dict[str, Any] = {}
        self.loading = cast(Any, SimpleNamespace(result=lambda: None))
        told_accuracy = {"ask": lambda *_: None, "evaluate": lambda *_: {"accuracy": accuracy.pop(0)()}}
        self.rollouts = cast(Any, SimpleNamespace(**told_accuracy))
        actor = SimpleNamespace(save=lambda step, *_: told.append(f"save {step}"))
        self.groups = cast(Any, SimpleNamespace(training=lambda: [actor], cluster=SimpleNamespace(waiting=None)))

    def recover(self, loss: Lost | None = None) -> None:
        pass

    def generate(self) -> None:
        self.told.append(f"step {self.done + 1}")

    def score(self) -> None:
        pass

    def compute_advantages(self) -> Any:
        return None

    def update(self, scored: Any) -> dict[str, float]:
        return {"grpo/score/mean": 0.5}

    def sync_weights(self) -> None:
        pass

    def report(self, scored: Any, metrics: dict[str, float]) -> None:
        self.done += 1
        self.log.step(self.done, metrics)

    def evaluate(self) -> None:
        self.told.append(f"evaluate {self.done}")
        super().evaluate()


def test_a_step_is_saved_before_it_is_evaluated_and_a_lost_evaluation_is_made_up_for(
    corpus: Corpus, rlaif: Path
) -> None:
    config = configured(corpus, rlaif, ["minimind_shape"], minimind={"eval_interval": 2})
    told: list[str] = []

    def spoilt() -> float:
        raise UserError("spoilt")

    with pytest.raises(UserError, match="spoilt"):
        train(Rehearsal(config, 0, told, [lambda: 0.1, spoilt]))
    assert told == ["evaluate 0", "step 1", "step 2", "save 2", "evaluate 2"]
    told.clear()
    train(Rehearsal(config, 2, told, [lambda: 0.3, lambda: 0.5]))
    assert told == ["evaluate 2", "step 3", "step 4", "save 4", "evaluate 4"]
    told.clear()
    train(Rehearsal(config, 4, told, []))
    assert told == []
    rows = read_history(Path(config.minimind.output_dir) / "metrics.jsonl")
    assert [(row["iteration"], row.get("eval/accuracy")) for row in rows] == [
        *((0, 0.1), (1, None), (2, None), (2, 0.3), (3, None), (4, None), (4, 0.5)),
    ]


# Several turns


def test_what_an_environment_says_earns_nothing_and_is_written_down(corpus: Corpus, rlaif: Path, mine: str) -> None:
    config = configured(corpus, rlaif, [f"{mine}:boxed", f"{mine}:told"], megatron_training={"global_batch_size": 2})
    source = source_of(config, lambda row: f"turn{row // 8}")
    said = np.array(source.tokenizer("boxed 42", add_special_tokens=False)["input_ids"], np.int32)

    def two_turns(trajectories: list[Trajectory], engines: Any, sampling: Any) -> None:
        engines.generate(trajectories, sampling)
        for trajectory in trajectories:
            trajectory.append_observation(said)
        engines.generate(trajectories, sampling)
        engines.generate([], sampling)

    source.rollout_function = two_turns
    experience = source.generate()
    source.score(experience)
    assert experience.scores[f"{mine}:boxed"].tolist() == [0.0] * 8
    assert experience.scores[f"{mine}:told"].tolist() == [1.0 + len(said)] * 8
    experience.batch.advantages = experience.batch.mask * 0.5
    experience.batch.taught = torch.tensor([1.0] * 4 + [0.0] * 4)
    lines = list(trajectories(experience, 1))
    assert [part["source"] for part in lines[0]["segments"]] == ["policy", "environment", "policy"]
    assert lines[0]["segments"][1] == {
        "source": "environment", "text": "boxed 42", "tokens": len(said), "in_loss": False,
    }  # fmt: skip
    assert [part["in_loss"] for part in lines[0]["segments"]] == [True, False, True]
    assert not any(part["in_loss"] for part in lines[4]["segments"])
    assert lines[0]["advantage"] == 0.5 and "42" in lines[0]["response"]


def test_a_verifier_reads_the_policy_s_text_alone() -> None:
    told = {"source": "environment", "text": r"The right answer is \boxed{42}. Say ok."}
    own = [{"source": "policy", "text": text} for text in ("I do not know.", "ok")]
    responses, labels, _, more = _task(
        [{"prompt": "6 * 7?", "label": "42", "segments": [own[0], told, own[1]]}], [], torch.tensor([5])
    )
    assert responses == ["I do not know.\nok"]
    with Rewards(["math_17k_acc"], [1.0]) as rewards:
        assert rewards.score(responses, labels, **more).total.tolist() == [0.0]


def test_a_prompt_without_a_response_is_the_user_s_error(corpus: Corpus, rlaif: Path) -> None:
    source = source_of(configured(corpus, rlaif, ["minimind_shape"]), lambda row: "a")
    source.rollout_function = lambda trajectories, engines, sampling: engines.generate(trajectories[1:], sampling)
    with pytest.raises(UserError, match="found a trajectory without a response to the prompt"):
        source.generate()


# Dynamic sampling


def test_metrics_of_dynamic_sampling_are_those_of_the_rows_that_are_trained_on(
    corpus: Corpus, rlaif: Path, mine: str
) -> None:
    name = f"{mine}:lettered"
    rl = {"filter_groups_enable": True, "filter_groups_metric": name, "filter_groups_max_batches": 3}
    config = configured(
        corpus, rlaif, [name], rl_config={**rl, "clip_ratio": 0.2}, megatron_training={"global_batch_size": 2},
        minimind={"algorithm": "dapo", "reward_failure_limit": 1.0},
    )  # fmt: skip
    # Two groups of four responses in each batch: which of them differ, and where a response cannot be scored.
    groups = ["a b b b", "b b b b", "a a a a", "b c b b", "a a b b", "a a a a"]
    source = source_of(config, lambda row: " ".join(groups).split()[row])
    whole = source.generate_differing()
    assert whole.batch.rewards is not None and whole.batch.rewards.tolist() == [1, 0, 0, 0, 1, 1, 0, 0]
    expected = {
        f"{name}_rewards/mean": 3 / 8, f"{name}_rewards/failures": 1.0, "group/zero_std": 0.0, "group/best": 1.0,
        "group/std": (0.1875**0.5 + 0.5) / 2, "train/num_gen_batches": 3.0,
    }  # fmt: skip
    assert {key: whole.metrics[key] for key in expected} == pytest.approx(expected)
    assert whole.scores[name].tolist() == whole.batch.rewards.tolist()
    assert len(whole.failures) == 1 and "no c" in whole.failures[0]


@pytest.mark.parametrize("algorithm", ["dapo", "reinforce_plus_plus_baseline", "reinforce_plus_plus"])
def test_groups_that_only_fill_a_step_teach_nothing(
    corpus: Corpus, rlaif: Path, mine: str, algorithm: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The responses of the group that is rejected are all wrong, and differ in the penalty of their length."""
    name = f"{mine}:letter"
    rl = {"filter_groups_enable": True, "filter_groups_metric": name, "filter_groups_max_batches": 1}
    rl |= {"overlong_buffer_enable": True, "overlong_buffer": 4, "rollout_max_tokens": 8, "init_kl_coef": 0}
    config = configured(
        corpus, rlaif, [name], rl_config=rl, megatron_training={"global_batch_size": 2},
        minimind={"algorithm": algorithm},
    )  # fmt: skip
    answers = ["b", "b" * 30, "b" * 30, "b", "a", "b", "a", "b"]
    whole = source_of(config, lambda row: answers[row]).generate_differing()
    batch = whole.batch
    assert batch.rewards is not None and batch.rewards[4:].unique().numel() == 2  # advantages, but for `taught`
    assert batch.taught is not None and batch.taught.tolist() == [1.0] * 4 + [0.0] * 4
    assert "1 of 2 groups differ after 1 batches" in capsys.readouterr().out
    alone = batch.select(torch.arange(4))
    for some in (batch, alone):
        Advantages(config, objective(config)).fill(some)
    assert batch.advantages is not None and alone.advantages is not None and alone.advantages.any()
    assert not batch.advantages[4:].any()
    torch.testing.assert_close(batch.advantages[:4, : alone.width], alone.advantages)


@pytest.mark.parametrize(("boxed", "reason"), [("right", "all_right"), ("wrong", "all_wrong")])
def test_a_batch_that_is_all_right_is_not_called_all_wrong(
    corpus: Corpus, tmp_path: Path, boxed: str, reason: str
) -> None:
    rl = {"filter_groups_enable": True, "filter_groups_metric": "acc_for_dapo", "filter_groups_max_batches": 2}
    megatron = {"global_batch_size": 2, "no_shuffle": True}
    config = configured(
        corpus, rl_trees.write_prompts(tmp_path / "sums", 4), ["acc_for_dapo"], rl_config=rl,
        megatron_training=megatron, minimind={"algorithm": "dapo"},
    )  # fmt: skip
    source = source_of(config, lambda row: f"Answer: {labels[row // 4] if boxed == 'right' else 'no'}")
    labels = source._column([source.prompts[place] for place in range(4)], "labels")
    assert source.generate_differing().metrics[f"group/dropped/{reason}"] == 4
