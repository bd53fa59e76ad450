"""Replay the routing of the rollout engine in the trainer's forward pass: `minimind.router_replay`.

Engine and trainer round differently. Where two experts score almost the same, they choose different experts, and the
log-probabilities of the token are those of two different models. With replay the trainer sends each token to the
experts that the engine chose; the weights of the experts and the gradient of the router are still the trainer's own
(rollout routing replay, R3, arXiv:2510.11370). The reference model chooses by itself.

    engine    RouteRecorder           [tokens of prompt and response - 1, layers, k] of each response
    batch     Batch.routes            [rows, length, layers, k]
    trainer   attach, then replay     megatron-core's RouterReplay in each router
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from minimind_mcore.errors import UserError

if TYPE_CHECKING:
    from minimind_mcore.rl.runtime.batch import Batch


class RouteRecorder:
    """Note the experts that a model of transformers chooses. Experts are uint8: there are at most 256."""

    def __init__(self, model: Any) -> None:
        self.chosen: list[Tensor] = []
        for layer in model.model.layers:
            layer.mlp.gate.register_forward_hook(self._note)

    def _note(self, router: Any, inputs: Any, output: Any) -> None:
        self.chosen.append(output[2].to(torch.uint8))

    def take(self, rows: int) -> Tensor:
        """Return the experts of the last forward pass, [rows, tokens, layers, k]."""
        found, self.chosen = torch.stack(self.chosen, dim=1), []
        return found.view(rows, -1, *found.shape[1:])


def _routers(chunk: Any) -> Iterator[tuple[int, Any]]:
    """Yield the number of each layer with experts, from 0 in the whole model, and its router."""
    for layer in chunk.decoder.layers:
        if router := getattr(layer.mlp, "router", None):
            yield layer.layer_number - 1, router


def attach(chunks: Sequence[Any]) -> None:
    """Let the routers of a rank's GPTModels replay.

    Raises:
        UserError: megatron-core is too old.
    """
    try:
        from megatron.core.transformer.moe.router_replay import RouterReplay
    except ImportError as error:
        raise UserError(
            "minimind.router_replay: found no RouterReplay in megatron-core, expected 0.16 or newer"
        ) from error
    for chunk in chunks:
        for _, router in _routers(chunk):
            router.router_replay = RouterReplay()
    RouterReplay.clear_global_router_replay_instances()  # it would keep the routers of a model that is gone


def replay(chunk: Any, rows: Batch, tp_rank: int, tp_size: int) -> None:
    """Set the experts of the next forward pass, if the model replays and the routes are known.

    Args:
        chunk: the GPTModel.
        rows: of the micro-batch, padded.
        tp_rank: which part of the sequence this rank has.
        tp_size: number of parts, 1 without sequence parallelism.
    """
    replaying = [(number, router.router_replay) for number, router in _routers(chunk) if _replays(router)]
    if not replaying:
        return
    from megatron.core.transformer.moe.router_replay import RouterReplayAction

    targets = None if rows.routes is None else _targets(rows.routes, rows.lengths).chunk(tp_size)[tp_rank].flatten(0, 1)
    for number, router in replaying:
        router.clear_indices()
        router.set_router_replay_action(None if targets is None else RouterReplayAction.REPLAY_FORWARD)
        if targets is not None:
            router.set_target_indices(targets[:, number])


def _replays(router: Any) -> bool:
    return getattr(router, "router_replay", None) is not None


def _targets(routes: Tensor, lengths: Tensor) -> Tensor:
    """Return [length, rows, layers, k] int64.

    The last token of a response and the padding predict nothing: they go to experts 0 to k - 1.
    """
    places = torch.arange(routes.shape[1], device=routes.device)
    known = (places < lengths[:, None] - 1)[:, :, None, None]
    first = torch.arange(routes.shape[3], device=routes.device)
    return torch.where(known, routes.long(), first).transpose(0, 1)
