"""DAPO's penalty of responses near the maximum length (arXiv 2503.14476, eq. 13)."""

from __future__ import annotations

from torch import Tensor


def overlong(lengths: Tensor, room: int, buffer: int, factor: float = 1.0) -> Tensor:
    """Return 0 up to `room - buffer` tokens, then a linear decrease to -factor at `room` tokens.

    Args:
        lengths: [B], tokens of each response.
        room: the maximum response length (`rollout_max_tokens`).
        buffer: number of tokens over which the penalty grows (`overlong_buffer`).
        factor: penalty at the maximum length (`overlong_buffer_penalty_factor`).

    Returns:
        [B], at most 0.
    """
    beyond = (lengths.float() - (room - buffer)).clamp(0, buffer)
    return -(beyond / buffer * factor)
