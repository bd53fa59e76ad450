"""Figures of learning: the schedule, LoRA, DPO on one pair, and GRPO on one prompt."""

from __future__ import annotations

import copy
import random
from typing import Any

import torch
from torch import Tensor

from minimind_mcore.errors import UserError
from minimind_mcore.figures.study import Study, rounded
from minimind_mcore.models.presets import get_preset
from minimind_mcore.rl.algorithms.advantages import group_norm
from minimind_mcore.rl.algorithms.losses import aggregate, policy_loss

STYLES = ("cosine", "linear", "constant", "WSD")
SCHEDULE = {"lr": 3e-3, "min_lr": 3e-4, "warmup": 50, "iterations": 1000, "decay": 200}
RANKS = (1, 2, 4, 8, 16, 32, 64)
TARGETS = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")
PAIR = {"prompt": "27+38=?", "chosen": "65", "rejected": "55"}
DPO: dict[str, Any] = {"beta": 0.1, "lr": 1e-5, "steps": 12}
GROUP: dict[str, Any] = {"samples": 8, "temperature": 1.0, "lr": 3e-5, "updates": 4, "clip": 0.2}


def schedule(study: Study) -> dict[str, Any]:
    """The learning rates of megatron-core's scheduler, every tenth iteration, for each style of decay."""
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    rates: dict[str, list[float]] = {style: [] for style in STYLES}
    for style in STYLES:
        optimizer: Any = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.0)
        scheduler = OptimizerParamScheduler(
            optimizer, init_lr=0.0, max_lr=SCHEDULE["lr"], min_lr=SCHEDULE["min_lr"],
            lr_warmup_steps=int(SCHEDULE["warmup"]), lr_decay_steps=int(SCHEDULE["iterations"]), lr_decay_style=style,
            start_wd=0.0, end_wd=0.0, wd_incr_steps=0, wd_incr_style="constant",
            wsd_decay_steps=int(SCHEDULE["decay"]) if style == "WSD" else None, lr_wsd_decay_style="linear",
        )  # fmt: skip
        for _ in range(0, int(SCHEDULE["iterations"]) + 1, 10):
            rates[style].append(float(f"{optimizer.param_groups[0]['lr']:.6g}"))
            scheduler.step(increment=10)
    return {**SCHEDULE, "every": 10, "rates": rates}


@torch.no_grad()
def lora(study: Study) -> dict[str, Any]:
    """Return the singular values of each matrix's change by fine-tuning, and adapter parameter counts by LoRA rank."""
    before, after = (study.models[name].state_dict() for name in ("pretrain", "full_sft"))
    changes = []
    for name, weight in after.items():
        if name.endswith("_proj.weight"):
            values = torch.linalg.svdvals(weight.double() - before[name].double())
            changes.append({"name": name.removeprefix("model.layers."), "values": [float(f"{v:.3g}") for v in values]})
    sizes = {
        name: {
            "all": get_preset(name).num_parameters(),
            "adapters": [get_preset(name).num_adapter_parameters(rank, TARGETS) for rank in RANKS],
        }
        for name in ("minimind3_tiny", "minimind3")
    }
    return {"ranks": list(RANKS), "targets": list(TARGETS), "models": sizes, "changes": changes}


def _log_probs(model: Any, prompt: list[int], answers: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the tokens of answers to one prompt, and their mask, [answers, longest answer]."""
    width = max(map(len, answers))
    rows = torch.tensor([prompt + answer + [0] * (width - len(answer)) for answer in answers])
    mask = torch.tensor([[1.0] * len(answer) + [0.0] * (width - len(answer)) for answer in answers])
    logits = model(rows).logits[:, len(prompt) - 1 : -1]
    return logits.log_softmax(-1).gather(2, rows[:, len(prompt) :, None]).squeeze(2), mask


def _trainable(model: Any, lr: float) -> tuple[Any, torch.optim.Optimizer]:
    policy = copy.deepcopy(model).requires_grad_(True)
    return policy, torch.optim.AdamW(policy.parameters(), lr=lr, weight_decay=0.0)


def dpo(study: Study) -> dict[str, Any]:
    """Return log-probabilities of a chosen and a rejected answer while DPO trains on this pair only."""
    from minimind_mcore.posttrain.dpo import preference_losses
    from minimind_mcore.training.config import ObjectiveSection

    prompt = study.ids(study.chat(PAIR["prompt"]))
    end = str(study.texts.eos_token)
    answers = [study.ids(PAIR[side] + end) for side in ("chosen", "rejected")]
    policy, optimizer = _trainable(study.models["early_sft"], DPO["lr"])
    steps, reference = [], torch.zeros(2)
    for step in range(int(DPO["steps"]) + 1):
        log_probs, mask = _log_probs(policy, prompt, answers)
        sums = (log_probs * mask).sum(1)
        reference = reference if step else sums.detach()
        gained = sums - reference
        loss = preference_losses(ObjectiveSection(dpo_beta=DPO["beta"]), (gained[0] - gained[1])[None]).mean()
        steps.append({"chosen": rounded(sums[0], 4), "rejected": rounded(sums[1], 4), "loss": rounded(loss, 5)})
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
    return {**PAIR, **DPO, "steps": steps}


@torch.no_grad()
def sample(study: Study, question: str, generator: torch.Generator) -> list[list[int]]:
    """Sample a group of answers from the half-trained model `early_sft`. An answer has at most 6 tokens."""
    model, end = study.models["early_sft"], study.texts.eos_token_id
    rows = torch.tensor([study.ids(study.chat(question))] * GROUP["samples"])
    answers: list[list[int]] = [[] for _ in rows]
    for _ in range(6):
        probabilities = (model(rows).logits[:, -1] / GROUP["temperature"]).softmax(-1)
        chosen = torch.multinomial(probabilities, 1, generator=generator)
        for answer, token in zip(answers, chosen[:, 0].tolist(), strict=True):
            if not answer or answer[-1] != end:
                answer.append(token)
        rows = torch.cat([rows, chosen], 1)
    return answers


def grpo(study: Study) -> dict[str, Any]:
    """Return a group of answers to one prompt, their rewards and advantages, and the ratios after each update."""
    generator, drawn = torch.Generator().manual_seed(1), random.Random(1)
    for _ in range(200):
        first, second = drawn.randint(11, 49), drawn.randint(11, 49)
        answers = sample(study, f"{first}+{second}=?", generator)
        texts = [str(study.texts.decode(answer, skip_special_tokens=True)).strip() for answer in answers]
        rewards = torch.tensor([float(text == str(first + second)) for text in texts])
        if 0.2 < rewards.mean() < 0.8:
            break
    else:
        raise UserError("no prompt has right and wrong answers in a group: the model of the figures learned too little")
    policy, optimizer = _trainable(study.models["early_sft"], GROUP["lr"])
    prompt = study.ids(study.chat(f"{first}+{second}=?"))
    updates: list[dict[str, Any]] = []
    old, advantages = None, torch.zeros(0)
    for _ in range(int(GROUP["updates"]) + 1):
        log_probs, mask = _log_probs(policy, prompt, answers)
        old = log_probs.detach() if old is None else old
        advantages = group_norm(rewards, mask, int(GROUP["samples"]))
        clip = GROUP["clip"]
        losses, stats = policy_loss(log_probs, old, advantages, mask, clip_low=clip, clip_high=clip)
        loss = aggregate(losses, mask)
        ratios = ((log_probs - old).exp() * mask).detach()
        kept = [rounded(row[: len(answer)], 4) for row, answer in zip(ratios, answers, strict=True)]
        updates.append({"ratios": kept, "loss": rounded(loss, 5), "clipped": rounded(stats["actor/pg_clipfrac"])})
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
    return {
        "prompt": f"{first}+{second}=?",
        "answer": str(first + second),
        **GROUP,
        "responses": [study.pieces(answer) for answer in answers],
        "rewards": rewards.tolist(),
        "advantages": rounded(advantages[:, 0], 4),
        "updates": updates,
    }
