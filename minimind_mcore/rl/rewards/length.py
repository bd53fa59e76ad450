"""DAPO's penalty of answers that come near the end of their room (arXiv 2503.14476, eq. 13)."""

from __future__ import annotations

from torch import Tensor


def overlong(lengths: Tensor, room: int, buffer: int, factor: float = 1.0) -> Tensor:
    """0 up to `room - buffer` tokens, then evenly down to -factor.

    Args:
        lengths: [B], tokens of each response.
        room: the longest response (`rollout_max_tokens`).
        buffer: tokens over which the penalty grows (`overlong_buffer`).
        factor: the penalty of a response that fills the room (`overlong_buffer_penalty_factor`).

    Returns:
        [B], at most 0.
    """
    beyond = (lengths.float() - (room - buffer)).clamp(0, buffer)
    return -(beyond / buffer * factor)
