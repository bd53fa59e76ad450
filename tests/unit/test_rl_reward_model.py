"""A reward model scores as when it is called by hand: a sequence classifier, and one with `get_score`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from engine import Corpus
from transformers import AutoTokenizer, Qwen3Config, Qwen3ForSequenceClassification, Qwen3Model

from minimind_mcore.errors import UserError
from minimind_mcore.rl.rewards.reward_model import RewardModel, folded
from minimind_mcore.rl.rewards.rewards import Rewards

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
        scores = rewards.score(["x</think>1234567", "1" * 50], ["", ""], prompts=[PROMPT, PROMPT])
        assert scores.by_verifier["reward_model"].tolist() == [2.0, 3.0]
        assert scores.total.tolist() == [1.0, 1.5]
        with pytest.raises(UserError, match="prompts"):
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
