"""Initialize the weights, independently of the parallel layout.

Each tensor of the whole model comes from a generator seeded by `seed` and the tensor's name, and `initialize` sets
every rank's shard. Megatron's own initialization depends on the number of pipeline stages and, on a device, on the
tensor-parallel size.

| scheme     | matrices and embedding                                                     |
|------------|----------------------------------------------------------------------------|
| `megatron` | N(0, std). Output projections of attention and MLP: N(0, std / sqrt(2 layers)) |
| `normal`   | N(0, std): minimind-3 since 2026-04-19, by transformers' `post_init`         |
| `torch`    | U(-1/sqrt(fan_in), 1/sqrt(fan_in)), torch's default for a linear layer:     |
|            | MiniMind2, and minimind-3 before 2026-04-19. A tied embedding has the        |
|            | weights of the output layer. An untied embedding is N(0, 1), torch's default. |

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
    """Set this rank's parameters to their shards of the initial model.

    Args:
        chunks: GPTModels of this rank. megatron-core's parallel state determines the layout.
        config: the architecture.
        scheme: one of `SCHEMES`.
        seed: seed of the weights.
        std: Megatron's `--init-method-std`. `torch` ignores it.

    Raises:
        UserError: the scheme is unknown.
    """
    from minimind_mcore.models.loading import load_into  # imports megatron

    shapes = mcore_shapes(config)
    load_into(chunks, lambda name: initial_tensor(name, shapes[name], config, scheme=scheme, seed=seed, std=std))


def initial_tensor(
    name: str, shape: Shape, config: ModelConfig, *, scheme: str, seed: int, std: float = 0.02
) -> Tensor:
    """Return one tensor of the whole megatron-core model, in float32 on the CPU.

    Args:
        name: a key of `weights.mcore_shapes`.
        shape: shape of the tensor, [outputs, inputs] for a matrix.
        config: the architecture.
        scheme: see `initialize`.
        seed: see `initialize`.
        std: see `initialize`.
    """
    if scheme not in SCHEMES:
        raise UserError(f"initialization: found {scheme!r}, expected one of {', '.join(SCHEMES)}")
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
