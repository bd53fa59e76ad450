"""A trainer of plain torch around the transformers model: the oracle that runs of the engine are compared with.

It shares no code with the engine: the layers are those of transformers; AdamW, clipping and the learning
rates come from their formulas. Only the initial weights come through the kit's weight table.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minimind_mcore.models import weights
from minimind_mcore.models.config import ModelConfig


@dataclass(frozen=True)
class Hyper:
    """How the oracle trains: `lr(step)` for steps from 0, and which parameters decay."""

    lr: Callable[[int], float]
    weight_decay: float
    betas: tuple[float, float]
    decays: Callable[[Tensor], bool]


def initial_weights(folder: Path, config: ModelConfig) -> dict[str, Tensor]:
    """The saved weights under transformers' names."""
    file = folder / "iter_0000001" / "mp_rank_00" / "model_optim_rng.pt"
    state = torch.load(file, map_location="cpu", weights_only=False)["model"]
    whole = {name: tensor for name, tensor in state.items() if tensor is not None and "_extra_state" not in name}
    return weights.mcore_to_hf(whole, config, "hf_fused")


def load_twin(config: ModelConfig, state: dict[str, Tensor]) -> Any:
    """The transformers model of these weights."""
    import transformers

    torch.set_num_threads(1)  # more only wait for each other on tensors so small
    twin = transformers.AutoModelForCausalLM.from_config(config.hf_config(), attn_implementation="eager")
    missing = twin.load_state_dict(state, strict=False)
    assert set(missing.missing_keys) <= {"lm_head.weight"} and not missing.unexpected_keys
    twin.tie_weights()
    return twin


def train(
    twin: Any,
    config: ModelConfig,
    steps: Sequence[Sequence[Any]],
    loss: Callable[[Any], tuple[Tensor, Tensor]],
    hyper: Hyper,
    trained: list[Tensor] | None = None,
) -> tuple[list[float], list[float]]:
    """Losses and gradient norms of a training run.

    Args:
        twin: the model, changed in place.
        config: its architecture.
        steps: the micro-batches of each step.
        loss: of a micro-batch: what to report, and what to train on beside it.
        hyper: see there.
        trained: what to train in place of the model's parameters.
    """
    trained = trained or _trained_parameters(twin, config)
    groups = [{"params": [p for p in trained if hyper.decays(p)], "weight_decay": hyper.weight_decay}]
    groups.append({"params": [p for p in trained if not hyper.decays(p)], "weight_decay": 0.0})
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=hyper.betas, eps=1e-8)
    losses, norms = [], []
    for step, micro_batches in enumerate(steps):
        for group in optimizer.param_groups:
            group["lr"] = hyper.lr(step)
        parts = []
        for micro in micro_batches:
            reported, aux = loss(micro)
            ((reported + aux) / len(micro_batches)).backward()
            parts.append(reported.item())
        losses.append(sum(parts) / len(parts))
        norms.append(float(torch.nn.utils.clip_grad_norm_(trained, 1.0)))
        optimizer.step()
        optimizer.zero_grad()
    return losses, norms


class _AlwaysOn(torch.nn.Module):
    """A gate whose sigmoid is 1."""

    def forward(self, x: Tensor) -> Tensor:
        return x.new_full((*x.shape[:-1], 1), torch.inf)


def _trained_parameters(twin: Any, config: ModelConfig) -> list[Tensor]:
    """The twin's parameters less those that MiniMind does not have (the zero biases and gates of Qwen2-MoE)."""
    if config.moe and config.moe.shared_ffn_hidden_size:
        # A zero gate halves a doubled weight: the same function, but not for Adam, whose steps have one size.
        for layer in twin.model.layers:
            layer.mlp.shared_expert.down_proj.weight.data /= 2
            layer.mlp.shared_expert_gate = _AlwaysOn()
    absent = {n for rule in weights.rules(config, "hf_fused") if isinstance(rule, weights.Zeros) for n in rule.hf}
    return [parameter for name, parameter in twin.named_parameters() if name not in absent]
