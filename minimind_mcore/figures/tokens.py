"""Figures of tokens: the tokenizer itself, embeddings, the loss mask, and the logits of the next token."""

from __future__ import annotations

import json
import string
from typing import Any

import numpy as np
import torch

from minimind_mcore.errors import require
from minimind_mcore.figures.study import ALPHABET, Study, rounded
from minimind_mcore.preprocess.indexed import IGNORED
from minimind_mcore.preprocess.messages import Conversation
from minimind_mcore.preprocess.templates import TokenizerTemplate
from minimind_mcore.preprocess.tokenize import tokenizer_info

TEXTS = (
    "MiniMind learns to add: 17+25=42.",
    "tokenization isn't free, and neither are   spaces",
    "<|im_start|>user\n17+25等于多少？<|im_end|>\n",
    "def add(a, b):\n    return a + b  # 你好 😀",
)
QUESTION = "27+38=?"


def tokenizer(study: Study) -> dict[str, Any]:
    """Return the tokenizer that the page runs: added tokens, merges in order, pre-tokenizer, and examples."""
    content = json.loads((study.tokenizer / "tokenizer.json").read_text(encoding="utf-8"))
    merges = [" ".join(pair) if isinstance(pair, list) else pair for pair in content["model"]["merges"]]
    added = [token["content"] for token in content["added_tokens"]]
    listed = [*added, *ALPHABET, *(pair.replace(" ", "") for pair in merges)]
    require(
        content["model"]["vocab"] == {token: number for number, token in enumerate(listed)},
        f"{study.tokenizer}: the ids do not follow from added tokens, bytes and merges, as the page assumes",
    )
    examples = [{"text": text, "ids": study.ids(text)} for text in TEXTS]
    return {"added": added, "merges": merges, "pre_tokenizer": content["pre_tokenizer"], "examples": examples}


def embeddings(study: Study) -> dict[str, Any]:
    """The embeddings of some tokens, and their two principal components."""
    words = [*string.digits, *string.ascii_uppercase, *"=+?,.:", "Ġis", "<|im_start|>", "<|im_end|>"]
    vocabulary = study.texts.get_vocab()
    ids = [vocabulary[word] for word in words if word in vocabulary]
    weight = study.models["full_sft"].get_input_embeddings().weight
    vectors = weight[ids].detach().double()
    centred = vectors - vectors.mean(0)
    _, values, directions = torch.linalg.svd(centred, full_matrices=False)
    return {
        "tokens": study.pieces(ids),
        "ids": ids,
        "vectors": rounded(vectors, 3),
        "points": rounded(centred @ directions[:2].T, 3),
        "explained": rounded(values[:2].square().sum() / values.square().sum()),
        "shape": list(weight.shape),
    }


def mask(study: Study) -> dict[str, Any]:
    """Return the tokens of a conversation, and the loss masks for all answers and for the last answer only."""
    info = tokenizer_info(study.tokenizer)
    messages = [
        {"role": "user", "content": QUESTION},
        {"role": "assistant", "content": "65"},
        {"role": "user", "content": "12+34=?"},
        {"role": "assistant", "content": "46"},
    ]
    labels = {}
    ids: list[int] = []
    for name, last in (("all", False), ("last", True)):
        template = TokenizerTemplate(info, study.encoder, last_only=last)
        (text,) = template.render(Conversation(messages))[0]
        whole, found, _ = template.label([study.encoder.encode([text])[0].astype(np.int32)])
        ids = whole.tolist()
        labels[name] = [int(label != IGNORED) for label in found.tolist()]
    losses = _token_losses(study, ids)
    return {"pieces": study.pieces(ids), "ids": ids, "learned": labels, "losses": rounded(losses)}


@torch.no_grad()
def _token_losses(study: Study, ids: list[int]) -> torch.Tensor:
    """Return the cross entropy of each token given the tokens before it. 0 for the first token."""
    logits = study.models["full_sft"](torch.tensor([ids])).logits[0, :-1]
    losses = torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:]), reduction="none")
    return torch.cat([torch.zeros(1), losses])


@torch.no_grad()
def sampling(study: Study) -> dict[str, Any]:
    """Return the logits of the next token after some prompts, sorted in descending order.

    In units of 0.01, `first` is the largest logit, and `drops` are the differences between neighbours.
    """
    prompts = {
        "sum": ("full_sft", study.chat(QUESTION) + "6"),
        "greeting": ("full_sft", study.chat("What can you do?") + "I can"),
        "prose": ("moe", study.texts.bos_token + "Return a list of the"),
    }
    found = []
    for name, (model, prompt) in prompts.items():
        logits = study.models[model](torch.tensor([study.ids(prompt)])).logits[0, -1]
        values, order = (logits * 100).round().long().sort(descending=True)
        found.append(
            {
                "name": name,
                "model": model,
                "prompt": prompt,
                "tokens": study.pieces(order[:40].tolist()),
                "ids": order[:40].tolist(),
                "first": int(values[0]),
                "drops": (values[:-1] - values[1:]).tolist(),
            }
        )
    return {"prompts": found}
