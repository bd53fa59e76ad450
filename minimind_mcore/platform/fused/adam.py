"""AdamW with the interface of Apex's FusedAdam that Megatron expects, on torch's fused kernel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


class FusedAdam(torch.optim.Optimizer):
    """AdamW (decoupled weight decay) that keeps `step` in its parameter groups.

    Megatron's distributed optimizer and checkpoints expect the state of Apex and Transformer Engine: only `exp_avg` and
    `exp_avg_sq` per parameter. torch's AdamW has a third entry, `step`, with which Megatron fails. MindSpeed has the
    same state as Apex, so its checkpoints are compatible.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        adam_w_mode: bool = True,
        capturable: bool = False,
    ) -> None:
        if not adam_w_mode:
            raise ValueError("FusedAdam: adam_w_mode=False (Adam with L2 regularisation) is not implemented; use AdamW")
        if capturable:  # megatron-core 0.17 and later set this for CUDA graphs
            raise ValueError("FusedAdam: capturable=True (CUDA graphs) is not supported: the host counts the steps")
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            group["step"] = int(group.get("step", 0)) + 1  # int(): MindSpeed 2.2.0 saves a tensor
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            for p in params:
                if not self.state[p]:
                    self.state[p] = {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
            torch._fused_adamw_(  # pyright: ignore[reportPrivateImportUsage]
                params,
                [p.grad for p in params],
                [self.state[p]["exp_avg"] for p in params],
                [self.state[p]["exp_avg_sq"] for p in params],
                [],
                [torch.full((), float(group["step"]), device=params[0].device)] * len(params),
                amsgrad=False,
                lr=group["lr"],
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=False,
            )
