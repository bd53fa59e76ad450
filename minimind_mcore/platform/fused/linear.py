"""A linear layer for weights that do not change over many calls, as in generation.

On a CPU the weight is stored once in oneDNN's blocked layout. `F.linear` uses MKL, which reorders the weight at each
call. At a batch size of 16 reordering takes longer than the product.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


class Linear:
    """Compute `x weight^T + bias`.

    Args:
        weight: [out, in].
        bias: [out].
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.weight, self.bias = weight.detach(), bias
        self.packed: Tensor | None = None
        self.pack()

    def pack(self) -> None:
        """Copy the weight to oneDNN's layout (fp32 on a CPU only). Call this after the weight has changed."""
        on_cpu = self.weight.device.type == "cpu" and self.weight.dtype == torch.float32
        if on_cpu and torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
            # torch.compile uses these operators for frozen weights. torch has no public API for them.
            self.packed = torch.ops.mkldnn._reorder_linear_weight(self.weight)

    def __call__(self, x: Tensor, added: Tensor | None = None) -> Tensor:
        """Return the product [..., out] for `x` [..., in], plus `added` [..., out]."""
        if self.packed is None:
            out = F.linear(x, self.weight, self.bias)
            return out if added is None else added + out
        product = torch.ops.mkldnn._linear_pointwise
        if added is None:
            result: Tensor = product(x, self.packed, self.bias, "none", [], "")
        else:
            result = product.binary(x, added, self.packed, self.bias, "add")
        return result
