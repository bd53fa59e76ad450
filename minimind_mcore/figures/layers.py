"""Figures of a layer: attention, rotary embedding, norm, SwiGLU, and the routing of a mixture of experts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from minimind_mcore.figures.study import MIXTURES, Study, per_mille, rounded, watch
from minimind_mcore.figures.tokens import QUESTION
from minimind_mcore.models import yarn
from minimind_mcore.models.moe import straight_through
from minimind_mcore.models.presets import get_preset

LAYER = 1  # the layer in figures that show one layer
MIXED = "Return the sum of 17 and 25. 小明有 3 个苹果。\n    if x in list: return None"


@torch.no_grad()
def attention(study: Study) -> dict[str, Any]:
    """Return the causal attention weights of all layers and heads on a question and its answer."""
    ids = study.ids(study.chat(QUESTION) + "65")
    maps = study.models["full_sft"](torch.tensor([ids]), output_attentions=True).attentions
    rows = [[[per_mille(row[: place + 1]) for place, row in enumerate(head)] for head in layer[0]] for layer in maps]
    return {"pieces": study.pieces(ids), "weights": rows}


def rope(study: Study) -> dict[str, Any]:
    """A query and a key before the rotation, the frequencies, and what YaRN multiplies them by."""
    model = study.models["full_sft"]
    config = model.config
    ids = study.ids(study.chat(QUESTION))
    block = f"model.layers.{LAYER}.self_attn"
    (_, queries), (_, keys) = watch(model, ids, f"{block}.q_norm", f"{block}.k_norm")
    theta = get_preset("minimind3").rope_theta
    frequencies = {}
    for name in ("minimind3_tiny", "minimind3"):
        size = get_preset(name).head_dim
        exponents = torch.arange(0, size, 2, dtype=torch.float64) / size
        frequencies[name] = {
            "head_dim": size,
            "frequencies": (theta**-exponents).tolist(),
            "yarn": [round(factor, 6) for factor in yarn.factors(size, theta)],
        }
    return {
        "theta": theta,
        "models": frequencies,
        "factor": yarn.FACTOR,
        "trained_length": yarn.TRAINED_LENGTH,
        "query": rounded(queries[-1, 0]),
        "key": rounded(keys[len(ids) // 2, 0]),
        "scale": config.head_dim**-0.5,
    }


def norm(study: Study) -> dict[str, Any]:
    """Return an RMSNorm's input, weight and output for one token, and the vectors inside the SwiGLU that follows."""
    model = study.models["full_sft"]
    ids = study.ids(study.chat(QUESTION))
    layer = f"model.layers.{LAYER}"
    names = ("post_attention_layernorm", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    (x, y), (_, gate), (_, up), (product, _) = watch(model, ids, *(f"{layer}.{name}" for name in names))
    module = model.get_submodule(f"{layer}.post_attention_layernorm")
    return {
        "token": study.pieces(ids[-1:])[0],
        "eps": module.variance_epsilon,
        "input": rounded(x[-1], 4),
        "weight": rounded(module.weight, 4),
        "output": rounded(y[-1], 4),
        "gate": rounded(gate[-1]),
        "up": rounded(up[-1]),
        "product": rounded(product[-1]),
    }


def moe(study: Study) -> dict[str, Any]:
    """The router's probabilities for each token of a text, and the gradient that the router gets from the loss."""
    ids = study.ids(study.texts.bos_token + MIXED)
    models = []
    for name, rule in MIXTURES.items():
        model = study.models[name]
        with torch.no_grad():
            logits = model(torch.tensor([ids]), output_router_logits=True).router_logits
        shares = torch.stack([layer.float().softmax(-1) for layer in logits])
        gradients = {rule: _router_gradient(model, ids, rule) for rule in MIXTURES.values()}
        models.append({"rule": rule, "shares": per_mille(shares), "gradient": gradients})
    return {"pieces": study.pieces(ids), "models": models}


def _router_gradient(model: Any, ids: list[int], rule: str) -> float:
    """Return the norm of the gradient of the language-model loss with respect to the routers' weights, under a rule."""

    def route(module: Any, inputs: object, output: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        logits, weights, chosen = output
        if rule == "straight_through":
            scores = logits.float().softmax(-1)
            picked = torch.zeros_like(scores, dtype=torch.bool).scatter(1, chosen, True)
            weights = straight_through(scores * picked, picked).gather(1, chosen)
        return logits, weights, chosen

    routers = [layer.mlp.gate for layer in model.model.layers]
    handles = [router.register_forward_hook(route) for router in routers]
    for router in routers:
        router.weight.requires_grad_(True)
    try:
        row = torch.tensor([ids])
        model(row, labels=row).loss.backward()
        norms = [router.weight.grad.norm() for router in routers]
    finally:
        for handle in handles:
            handle.remove()
        for router in routers:
            router.weight.requires_grad_(False)
            router.weight.grad = None
    return float(f"{float(torch.stack(norms).norm()):.2g}")
