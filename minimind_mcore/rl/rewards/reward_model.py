"""Scores by a reward model: any sequence classifier of transformers, or a model with `get_score` such as InternLM2's.

The recipe is MiniMind's (trainer/trainer_utils.py: `LMForRewardModel`; trainer/train_grpo.py): earlier turns are quoted
in the question, only the text after the thought is scored, and the score is clipped to +-3.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from minimind_mcore.errors import UserError

Message = dict[str, str]


class RewardModel:
    """A frozen model that scores responses."""

    def __init__(self, path: str, *, limit: float = 3.0, trust_remote_code: bool = False) -> None:
        """Load the model, in float32 on the CPU.

        Args:
            path: a directory in Hugging Face format.
            limit: scores are clipped to +-limit.
            trust_remote_code: run the Python code in the directory, as InternLM2's reward model needs.

        Raises:
            UserError: the model cannot be loaded, has several outputs, or its tokenizer has no chat template.
        """
        from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification, AutoTokenizer

        try:
            config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
            classifier = any("SequenceClassification" in name for name in config.architectures or [])
            kind = AutoModelForSequenceClassification if classifier else AutoModel
            self.model = kind.from_pretrained(path, dtype=torch.float32, trust_remote_code=trust_remote_code)
            self.tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
        except (OSError, ValueError, ImportError) as error:
            allow = (
                "" if trust_remote_code else " (minimind.reward_model_trust_remote_code: true lets its own code run)"
            )
            raise UserError(f"reward model {path}: cannot be loaded: {error}{allow}") from error
        self.model.eval().requires_grad_(False)
        self.limit = limit
        outputs = getattr(config, "num_labels", 1) if classifier else 1
        if not classifier and not hasattr(self.model, "get_score"):
            raise UserError(
                f"reward model {path}: found {type(self.model).__name__}, expected a model for sequence classification "
                "or one with get_score (its own code runs with minimind.reward_model_trust_remote_code: true)"
            )
        if outputs != 1:
            raise UserError(f"reward model {path}: found {outputs} outputs (num_labels), expected 1, the score")
        if classifier and self.tokenizer.chat_template is None:
            raise UserError(f"reward model {path}: its tokenizer has no chat_template to write a conversation with")

    @torch.no_grad()
    def score(self, prompts: list[list[Message]], responses: list[str]) -> Tensor:
        """Return the scores [B] in float32, clipped to +-`limit`.

        Args:
            prompts: the conversation before each response, messages with `role` and `content`.
            responses: the text of each response.

        Raises:
            UserError: a prompt has no messages, or a score is not finite.
        """
        if not all(prompts):
            raise UserError(
                "reward model: found a prompt without messages, expected the conversation before the response; convert "
                "the data with this kit, which writes PREFIX_packed_prompts.jsonl beside it"
            )
        scores = [self._one(folded(prompt, answer(text))) for prompt, text in zip(prompts, responses, strict=True)]
        found = torch.tensor(scores, dtype=torch.float32)
        if not found.isfinite().all():
            raise UserError(f"reward model: found the scores {scores}, expected finite numbers")
        return found.clamp(-self.limit, self.limit)

    def _one(self, messages: list[Message]) -> float:
        if hasattr(self.model, "get_score"):
            return float(self.model.get_score(self.tokenizer, messages))
        tokens: Any = self.tokenizer.apply_chat_template(messages, return_tensors="pt", return_dict=True)
        output = self.model(tokens["input_ids"], tokens["attention_mask"])
        return float(output.logits[0, 0])


def answer(response: str) -> str:
    """Return the text after the first end of a thought, or the whole response if there is none."""
    _, end, rest = response.partition("</think>")
    return rest.strip() if end else response


def folded(prompt: list[Message], response: str) -> list[Message]:
    """Return one question and its answer. Earlier turns are quoted in the question, with MiniMind's wording."""
    *history, last = prompt
    question = last["content"]
    if history:
        told = "\n".join(f"{message['role']}: {message['content']}" for message in history)
        question = f"{told}\n以上是对话历史。我的新问题是：\n{question}"
    return [{"role": "user", "content": question}, {"role": "assistant", "content": response}]
