"""The native engine without a dataset: the caller supplies batches of token ids.

Runs in one process, or in torchrun's processes with a layout in `flags`.
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from minimind_mcore import arguments
from minimind_mcore.models.config import ModelConfig
from minimind_mcore.platform import device

if TYPE_CHECKING:
    from minimind_mcore.training.job import MicroBatch


class NativeEngine:
    """A model and its optimizer, built as in pretrain_gpt.py. Call `minimind_mcore.platform.device.setup()` first.

    Args:
        config: the architecture.
        batch: sequences of a micro-batch.
        seq: tokens of a sequence.
        bf16: mixed precision as with `--bf16`; otherwise fp32.
        micro_batches: number of micro-batches per step and data-parallel rank.
        flags: further flags of pretrain_gpt.py.
    """

    def __init__(
        self,
        config: ModelConfig,
        batch: int,
        seq: int,
        bf16: bool,
        micro_batches: int = 1,
        flags: Sequence[str] = (),
    ) -> None:
        from minimind_mcore.training import checkpointing, distributed
        from minimind_mcore.training.config import TrainConfig
        from minimind_mcore.training.job import Job
        from minimind_mcore.training.model import build_model
        from minimind_mcore.training.optimizer import build_optimizer
        from minimind_mcore.training.step import Engine
        from minimind_mcore.validation import validate

        sizes = {
            "--seq-length": seq,
            "--micro-batch-size": batch,
            "--lr": 5e-4,
            "--train-iters": 1000,
            "--transformer-impl": "local",
        }
        words = [str(word) for pair in sizes.items() for word in pair]
        self.args = arguments.parse([*config.megatron_flags(), *words, *(["--bf16"] if bf16 else []), *flags])
        world = int(os.environ.get("WORLD_SIZE", "1"))
        model_ranks = self.args.tensor_model_parallel_size * self.args.pipeline_model_parallel_size
        self.args.global_batch_size = batch * micro_batches * max(1, world // model_ranks)
        self.config = TrainConfig.from_args(self.args, validate(self.args, world))
        self.config, _ = checkpointing.settle_router_weight(self.config)
        self.job = Job(self.config)
        distributed.initialize(self.config)
        self.model: Any = build_model(self.config, self.job)
        self.engine: Engine | None = Engine(self.config, self.model, *build_optimizer(self.config, self.model))

    def step(self, ids: Tensor) -> Tensor:
        """Update the weights once. Return the mean loss (nats per token) as a tensor on the device; 0 before the last
        stage.

        Args:
            ids: [micro-batches * batch, seq + 1], this data-parallel rank's ids on the device.
        """
        assert self.engine is not None
        batches = self.batches(ids)
        count, samples = self.args.num_microbatches, self.args.global_batch_size
        result = self.engine.step(self.job, [iter(batches) for _ in self.model], count, samples, 0)
        total = torch.stack(result.losses).double().sum(0) if result.losses else torch.tensor([0.0, 1.0])
        return total[0] / total[1]

    def batches(self, ids: Tensor) -> list[MicroBatch]:
        """Split the ids of a step into micro-batches."""
        return [self._batch(part) for part in ids.chunk(self.args.num_microbatches)]

    def _batch(self, ids: Tensor) -> MicroBatch:
        rows, length = ids.shape[0], ids.shape[1] - 1
        return {
            "tokens": ids[:, :-1].contiguous(),
            "labels": ids[:, 1:].contiguous(),
            "loss_mask": torch.ones(rows, length, device=ids.device),
            "position_ids": torch.arange(length, device=ids.device).expand(rows, -1),
            "index": list(range(rows)),
        }

    @torch.no_grad()
    def logits(self, ids: Tensor) -> Tensor:
        """Return [batch, seq, vocabulary] fp32 logits of `ids` [batch, seq]."""
        positions = torch.arange(ids.shape[1], device=ids.device).expand(len(ids), -1)
        found: Tensor = self.model[0](ids, positions, None)
        return found.float()

    def close(self) -> None:
        """Free the model, and Megatron's groups for the next engine of this process."""
        from megatron.core import parallel_state
        from megatron.core.transformer.moe import moe_utils

        # The logged losses of a mixture of experts have one value per layer of this model.
        where: Any = moe_utils if hasattr(moe_utils, "get_moe_layer_wise_logging_tracker") else parallel_state
        where.get_moe_layer_wise_logging_tracker().clear()
        self.model = self.engine = None
        parallel_state.destroy_model_parallel()
        if "torch._dynamo" in sys.modules:
            torch._dynamo.reset()  # otherwise the next shape would be compiled with dynamic sizes, which is slower
        gc.collect()  # compiled layers refer to themselves
        if device.current().kind == "cuda":
            torch.cuda.empty_cache()
