"""How the weights start, the same whatever the parallel layout.

Each tensor of the whole model comes from a generator seeded by `seed` and the tensor's own name;
`initialize` gives every rank its part. Megatron's own initialisation instead depends on the
number of pipeline stages, and on a device on the tensor-parallel size.

| scheme     | matrices and embedding                                                     |
|------------|----------------------------------------------------------------------------|
| `megatron` | N(0, std); the outputs of attention and MLP N(0, std / sqrt(2 layers))       |
| `normal`   | N(0, std): minimind-3 since 2026-04-19, by transformers' `post_init`         |
| `torch`    | U(-1/sqrt(fan_in), 1/sqrt(fan_in)), torch's default for a linear layer:     |
|            | MiniMind2, and minimind-3 before that day. The embedding too, tied to one.  |

Norm weights start at 1.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from minimind_mcore.errors import UserError
from minimind_mcore.models.config import ModelConfig
from minimind_mcore.models.rules import Shape
from minimind_mcore.models.weights import EMBEDDING, mcore_shapes

SCHEMES = ("megatron", "normal", "torch")


def initialize(
    chunks: Sequence[torch.nn.Module], config: ModelConfig, *, scheme: str, seed: int, std: float = 0.02
) -> None:
    """Set this rank's parameters to their part of the initial model.

    Args:
        chunks: the GPTModels of this rank (megatron-core's parallel state knows the layout).
        config: the architecture.
        scheme: one of `SCHEMES`.
        seed: of the model.
        std: Megatron's `--init-method-std`; `torch` has none.

    Raises:
        UserError: no such scheme.
    """
    from minimind_mcore.models.loading import load_into  # imports megatron

    shapes = mcore_shapes(config)
    load_into(chunks, lambda name: initial_tensor(name, shapes[name], config, scheme=scheme, seed=seed, std=std))


def initial_tensor(
    name: str, shape: Shape, config: ModelConfig, *, scheme: str, seed: int, std: float = 0.02
) -> Tensor:
    """One tensor of the whole megatron-core model, float32, on the CPU.

    Args:
        name: as in `weights.mcore_shapes`.
        shape: as there: [outputs, inputs] of a matrix.
        config: the architecture.
        scheme: see `initialize`, as for `seed`, `std` and errors.
        seed: see there.
        std: see there.
    """
    if scheme not in SCHEMES:
        raise UserError(f"initialisation: found {scheme!r}, expected one of {', '.join(SCHEMES)}")
    if len(shape) == 1:
        return torch.ones(shape)
    digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little"))
    tensor = torch.empty(shape)
    if scheme == "torch":
        if name == EMBEDDING and not config.tie_embeddings:
            return tensor.normal_(generator=generator)
        bound = 1.0 / math.sqrt(shape[-1])
        return tensor.uniform_(-bound, bound, generator=generator)
    if scheme == "megatron" and name.endswith(("linear_proj.weight", "linear_fc2.weight")):
        std /= math.sqrt(2.0 * config.num_layers)
    return tensor.normal_(std=std, generator=generator)
