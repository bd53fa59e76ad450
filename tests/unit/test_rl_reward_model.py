"""A reward model scores as when it is called by hand: a sequence classifier, and one with `get_score`."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import rl_trees
from helpers.engine import Corpus
from helpers.rl_local import LocalWorkers
from transformers import AutoTokenizer, Qwen3Config, Qwen3ForSequenceClassification, Qwen3Model

from minimind_mcore.errors import UserError
from minimind_mcore.rl.config.load import resolve
from minimind_mcore.rl.config.objective import objective
from minimind_mcore.rl.config.schema import Config
from minimind_mcore.rl.rewards.reward_model import RewardModel, folded
from minimind_mcore.rl.rewards.rewards import Rewards
from minimind_mcore.rl.runtime import batch as batches
from minimind_mcore.rl.runtime.rollouts import Experience, RolloutManager
from minimind_mcore.rl.runtime.workers.reward import RewardWorker, build
from minimind_mcore.rl.verl.export import verl_overrides

CODE = """
from transformers import Qwen3Config, Qwen3Model
class Judge(Qwen3Model):
    config_class = Qwen3Config
    def get_score(self, tokenizer, messages):
        return float(len(messages[-1]["content"])) - 5
"""


def save(folder: Path, corpus: Corpus, model: type[Any], **settings: Any) -> str:
    tokenizer = AutoTokenizer.from_pretrained(corpus.tokenizer)
    config = Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, pad_token_id=0, **settings,
    )  # fmt: skip
    torch.manual_seed(0)
    model(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


PROMPT = [{"role": "user", "content": "abcd efgh"}]
TALK = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}, {"role": "user", "content": "3"}]


def test_classifier(corpus: Corpus, tmp_path: Path) -> None:
    path = save(tmp_path, corpus, Qwen3ForSequenceClassification, num_labels=1)
    with torch.no_grad():
        model = Qwen3ForSequenceClassification.from_pretrained(path)
        model.score.weight.mul_(20)
        model.save_pretrained(path)
        tokenizer = AutoTokenizer.from_pretrained(path)
        expected = []
        for prompt, answer in ((PROMPT, "aaaa"), (TALK, "bbbb cccc")):
            text = tokenizer.apply_chat_template(folded(prompt, answer), tokenize=False)
            tokens = tokenizer(text, add_special_tokens=False, return_tensors="pt")
            expected.append(model(**tokens).logits.item())
    judge = RewardModel(path, limit=100.0)
    found = judge.score([PROMPT, TALK], ["thought</think> aaaa", "bbbb cccc"])
    torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-5, atol=1e-5)
    assert len(set(found.tolist())) == 2
    judge.limit = abs(found[0].item()) / 2
    assert judge.score([PROMPT], ["aaaa"]).abs().item() == pytest.approx(judge.limit)


def test_model_with_get_score_beside_rules(corpus: Corpus, tmp_path: Path) -> None:
    path = save(tmp_path, corpus, Qwen3Model, architectures=["Judge"],
                auto_map={"AutoModel": "judge.Judge"})  # fmt: skip
    (tmp_path / "judge.py").write_text(CODE)
    judge = RewardModel(path, trust_remote_code=True)
    with Rewards(["format"], [1.0], model=judge, model_weight=0.5) as rewards:
        scores = rewards.score(["x</think>1234567", "1" * 50], ["", ""], messages=[PROMPT, PROMPT])
        assert scores.by_verifier["reward_model"].tolist() == [2.0, 3.0]
        assert scores.total.tolist() == [1.0, 1.5]
        with pytest.raises(UserError, match="messages"):
            rewards.score([""], [""])


def test_earlier_turns_are_quoted() -> None:
    question, answer = folded(TALK, "four")
    assert question["content"] == "user: one\nassistant: two\n以上是对话历史。我的新问题是：\n3"
    assert answer == {"role": "assistant", "content": "four"}


def test_what_is_no_reward_model_is_named(corpus: Corpus, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be loaded"):
        RewardModel(str(tmp_path / "absent"))
    with pytest.raises(UserError, match="found Qwen3Model, expected a model for sequence classification"):
        RewardModel(save(tmp_path / "plain", corpus, Qwen3Model))
    with pytest.raises(UserError, match="found 3 outputs"):
        RewardModel(save(tmp_path / "three", corpus, Qwen3ForSequenceClassification, num_labels=3))


def configured(corpus: Corpus, path: str, **ours: Any) -> Config:
    """A run with a rule and a reward model."""
    tree = rl_trees.tree(corpus)
    tree["rl_config"] |= {"verifier_function": ["format"], "verifier_weight": [2.0]}
    tree["minimind"] |= {"reward_model": path, "reward_model_weight": 0.5, **ours}
    return resolve(tree)


def rewards_of(config: Config, responses: list[str], talks: list[list[dict[str, str]]]) -> Experience:
    """What the driver makes of responses; the reward actor is an object of this process."""
    worker = RewardWorker(config)
    prompts: Any = SimpleNamespace(batches=lambda *_, **__: iter(()))  # the responses are given
    source = RolloutManager(config, objective(config), prompts, None, 0, LocalWorkers(None), LocalWorkers(worker))
    count = len(responses)
    batch = batches.make([[5]] * count, [[1, 2]] * count, [[-1.0, -1.0]] * count, [True] * count, [0] * count)
    parts = [[{"source": "policy", "text": response}] for response in responses]
    texts = [{"prompt": "p", "label": "", "segments": part} for part in parts]
    experience = Experience(batch, texts, talks, count)
    try:
        source.score(experience)
    finally:
        worker.rewards.close()
    return experience


RIGHT = "<think>a</think><answer>b c d</answer>"  # of the rule `format`


def test_the_yaml_s_classifier_adds_its_score_by_weight_within_its_range(corpus: Corpus, tmp_path: Path) -> None:
    path = save(tmp_path, corpus, Qwen3ForSequenceClassification, num_labels=1)
    model = Qwen3ForSequenceClassification.from_pretrained(path)
    with torch.no_grad():
        model.score.weight.mul_(20)
    model.save_pretrained(path)
    responses, talks = [RIGHT, "bbbb", "cc dd", "e"], [PROMPT, TALK, PROMPT, PROMPT]
    raw = RewardModel(path, limit=1e9).score(talks, responses)
    limit = float(raw.abs().sort().values[1:3].mean())  # half of them are cut
    assert (raw.abs() > limit).sum() == 2
    found = rewards_of(configured(corpus, path, reward_model_range=limit), responses, talks)
    rule = torch.tensor([2.0, 0.0, 0.0, 0.0])
    torch.testing.assert_close(found.batch.rewards, rule + 0.5 * raw.clamp(-limit, limit))
    assert found.metrics["reward_model_rewards/mean"] == pytest.approx(raw.clamp(-limit, limit).mean().item())


def test_the_yaml_s_model_with_get_score_runs_its_code_where_that_is_allowed(corpus: Corpus, tmp_path: Path) -> None:
    path = save(tmp_path, corpus, Qwen3Model, architectures=["Judge"], auto_map={"AutoModel": "judge.Judge"})
    (tmp_path / "judge.py").write_text(CODE)
    allowed = configured(corpus, path, reward_model_trust_remote_code=True, reward_model_range=2)
    found = rewards_of(allowed, [RIGHT, "1234", "1", "x" * 50], [PROMPT, TALK, PROMPT, PROMPT])
    assert found.scores["reward_model"].tolist() == [2.0, -1.0, -2.0, 2.0]
    assert found.batch.rewards is not None and found.batch.rewards.tolist() == [3.0, -0.5, -1.0, 1.0]
    with pytest.raises(UserError, match=r"without messages.*packed_prompts"):  # data that another program converted
        rewards_of(allowed, ["1"] * 4, [[]] * 4)
    unloadable = RewardWorker(configured(corpus, path))  # Ray would begin an actor whose __init__ fails again and again
    with pytest.raises(UserError, match="reward_model_trust_remote_code"):
        unloadable.prepare()
    with pytest.raises(UserError, match=r"minimind.reward_model: .*absent has no config.json"):
        build(configured(corpus, str(tmp_path / "absent")))
    with pytest.raises(UserError, match=r"reward_model: .* cannot be exported"):
        verl_overrides(configured(corpus, path), "x")
