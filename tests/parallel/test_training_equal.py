"""A training run equals one of plain torch around the transformers model: same weights, data, schedule, optimizer.

The oracle shares no code with the engine: it reads the .bin/.idx pair and Megatron's shuffle from
their definitions, takes the layers from transformers, and the auxiliary losses, AdamW, clipping and the
learning rates from their formulas. Only the initial weights come through the kit's weight table.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.engine import Corpus, Server, layout, worst_difference
from helpers.twin import Hyper, initial_weights, load_twin, train
from torch import Tensor

from minimind_mcore.models.config import ModelConfig, MoEConfig
from minimind_mcore.models.presets import PRESETS

STEPS, SEQUENCE, MICRO_BATCH, BATCH, SEED = 20, 32, 4, 8, 1234
MODELS: dict[str, ModelConfig] = {name: PRESETS[name] for name in ("minimind3_tiny", "minimind2_tiny")}
# transformers has no straight_through; tests/parallel/test_models_exact.py holds it to plain torch.
_TOP1 = MoEConfig(topk=1, ffn_hidden_size=448, load_balancing="aux_loss", aux_loss_coeff=5e-4)
for _rule in ("normalized", "softmax"):
    MODELS[f"minimind3_moe_tiny {_rule}"] = PRESETS["minimind3_moe_tiny"].replace(
        moe=dataclasses.replace(_TOP1, router_weight=_rule)
    )
MODELS["minimind2_moe_tiny"] = PRESETS["minimind2_moe_tiny"]


def minimind_lr(step: int) -> float:
    """MiniMind's `get_lr`, whose step counts from 1."""
    return 1e-3 * (0.1 + 0.45 * (1 + math.cos(math.pi * (step + 1) / STEPS)))


def megatron_lr(step: int) -> float:
    """Megatron's cosine with 4 steps of warm-up from 0; the value before the step."""
    if step <= 4:
        return 1e-3 * step / 4
    return 1e-4 + (1e-3 - 1e-4) * 0.5 * (1 + math.cos(math.pi * (step - 4) / (STEPS - 4)))


RECIPES: dict[str, tuple[Hyper, dict[str, Any]]] = {
    "minimind": (
        Hyper(minimind_lr, 1.0, (0.9, 0.999), lambda p: True),  # enough decay to see what decays
        {"lr_at_iteration_end": True, "decay_all": True, "weight_decay": 1.0, "minimind_init": "normal"},
    ),
    "megatron": (
        Hyper(megatron_lr, 1.0, (0.9, 0.95), lambda p: p.dim() > 1),
        {"lr_warmup_iters": 4, "weight_decay": 1.0, "adam_beta2": 0.95, "init_method_std": 0.05},
    ),
}


@pytest.mark.parametrize(
    ("model", "recipe"), [*((model, "minimind") for model in MODELS), ("minimind3_tiny", "megatron")]
)
def test_losses_equal_plain_torch(server: Server, corpus: Corpus, tmp_path: Path, model: str, recipe: str) -> None:
    hyper, flags = RECIPES[recipe]
    processes, parallel = (2, layout(pp=2)) if recipe == "megatron" else (1, layout())
    # A first run of no learning rate saves the initial weights.
    shared = {"train_iters": STEPS, "micro_batch_size": MICRO_BATCH, **flags}
    still = shared | {"train_iters": 1, "lr": 0.0, "min_lr": 0.0, "lr_warmup_iters": 0, "ckpt_format": "torch"}
    server.run(corpus.flags(MODELS[model], **still, save=tmp_path / "initial"), tmp_path / "still")
    found = server.run(corpus.flags(MODELS[model], **parallel, **shared), tmp_path / "run", processes)

    config = MODELS[model].replace(vocab_size=corpus.vocab_size)
    steps = [batch.long().split(MICRO_BATCH) for batch in batches(corpus).split(BATCH)]
    twin = load_twin(config, initial_weights(tmp_path / "initial", config))
    losses, norms = train(twin, config, steps, lambda micro: _loss(twin, config, micro), hyper)
    assert found.column("learning_rate") == pytest.approx([hyper.lr(step) for step in range(STEPS)], rel=1e-12)
    assert losses[-1] < losses[0] - 0.2, "it must learn something"
    differences = worst_difference(found.column(), losses), worst_difference(found.column("grad_norm"), norms)
    print("largest relative difference of losses and gradient norms:", *differences)
    assert differences[0] <= 1e-4
    # Rounding flips a router's choice between two nearly equal experts sooner or later.
    assert worst_difference(found.column("grad_norm")[:5], norms[:5]) <= 1e-4
    assert differences[1] <= 1e-2


def batches(corpus: Corpus) -> Tensor:
    """All samples that a run reads, in its order: [steps * batch, sequence + 1].

    Megatron's GPTDataset: documents shuffled (but for those of a last partial epoch), cut into
    samples that overlap by one token, samples shuffled.
    """
    raw = corpus.prefix.with_suffix(".idx").read_bytes()
    count = int.from_bytes(raw[18:26], "little")
    lengths = np.frombuffer(raw, np.int32, count, offset=34)
    ends = np.cumsum(lengths)
    tokens = np.fromfile(corpus.prefix.with_suffix(".bin"), np.int32)
    wanted = STEPS * BATCH
    assert wanted * SEQUENCE + 1 <= len(tokens), "one epoch is enough here"
    numbers = np.random.RandomState(SEED)
    documents = np.arange(count)
    numbers.shuffle(documents)
    line = np.concatenate([tokens[ends[d] - lengths[d] : ends[d]] for d in documents])
    samples = (len(line) - 1) // SEQUENCE
    order = np.arange(samples)
    numbers.shuffle(order)
    return torch.from_numpy(np.stack([line[s * SEQUENCE : (s + 1) * SEQUENCE + 1] for s in order[:wanted]]))


def _loss(twin: Any, config: ModelConfig, micro: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy and auxiliary loss of [batch, sequence + 1] tokens."""
    inputs, labels = micro[:, :-1], micro[:, 1:]
    if config.moe is None:
        logits = twin(inputs, use_cache=False).logits
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten()), logits.new_zeros(())
    logits, scores = _with_router_scores(twin, inputs)
    aux = sum(_aux_loss(config, layer) for layer in scores)
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten()), torch.as_tensor(aux)


def _with_router_scores(twin: Any, inputs: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Logits, and of every layer the softmax over all experts [batch, sequence, experts]."""
    scores: list[Tensor] = []

    def keep(module: Any, args: Any, output: Any) -> None:
        hidden = args[0].reshape(-1, args[0].shape[-1])
        scores.append(F.linear(hidden, module.weight).softmax(-1).view(*inputs.shape, -1))

    handles = [layer.mlp.gate.register_forward_hook(keep) for layer in twin.model.layers]
    logits = twin(inputs, use_cache=False).logits
    for handle in handles:
        handle.remove()
    return logits, scores


def _aux_loss(config: ModelConfig, scores: Tensor) -> Tensor:
    """model_minimind.py: `seq_aux` of MiniMind2, and the loss of minimind-3."""
    assert config.moe
    experts, topk = config.moe.num_experts, config.moe.topk
    hits = F.one_hot(scores.topk(topk, dim=-1).indices, experts).float()  # [b, s, k, E]
    if config.moe.load_balancing == "seq_aux_loss":
        ce = hits.sum((1, 2)) * experts / (scores.shape[1] * topk)
        return config.moe.aux_loss_coeff * (ce * scores.mean(1)).sum(1).mean()
    load = hits.flatten(0, 1).mean(0)  # [k, E]
    return config.moe.aux_loss_coeff * experts * (load * scores.flatten(0, 1).mean(0)).sum()
