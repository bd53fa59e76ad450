"""The native engine without a dataset: one process, batches of token ids from whoever measures."""

from __future__ import annotations

import gc
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
    """A model and its optimizer as pretrain_gpt.py builds them. `minimind_mcore.platform.device.setup()` comes first.

    Args:
        config: the architecture.
        batch: sequences of a micro-batch.
        seq: tokens of a sequence.
        bf16: mixed precision in bf16, as `--bf16`; else fp32.
        micro_batches: of a step.
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
            "--global-batch-size": batch * micro_batches,
            "--lr": 5e-4,
            "--train-iters": 1000,
            "--transformer-impl": "local",
        }
        words = [str(word) for pair in sizes.items() for word in pair]
        self.args = arguments.parse([*config.megatron_flags(), *words, *(["--bf16"] if bf16 else []), *flags])
        self.config = TrainConfig.from_args(self.args, validate(self.args, 1))
        self.config, _ = checkpointing.settle_router_weight(self.config)
        self.job = Job(self.config)
        distributed.initialize(self.config)
        self.model: Any = build_model(self.config, self.job)
        self.engine: Engine | None = Engine(self.config, self.model, *build_optimizer(self.config, self.model))

    def step(self, ids: Tensor) -> Tensor:
        """One update; returns the mean loss (nats per token), a tensor on the device.

        Args:
            ids: [micro-batches * batch, seq + 1], on the device.
        """
        batches = iter([self._batch(part) for part in ids.chunk(self.args.num_microbatches)])
        assert self.engine is not None
        count, samples = self.args.num_microbatches, self.args.global_batch_size
        result = self.engine.step(self.job, [batches], count, samples, 0)
        total = torch.stack(result.losses).double().sum(0)
        return total[0] / total[1]

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
        """[batch, seq, vocabulary] fp32 logits of `ids` [batch, seq]."""
        positions = torch.arange(ids.shape[1], device=ids.device).expand(len(ids), -1)
        found: Tensor = self.model[0](ids, positions, None)
        return found.float()

    def close(self) -> None:
        """Free the model, and Megatron's groups for the next engine of this process."""
        from megatron.core import parallel_state
        from megatron.core.transformer.moe import moe_utils

        # The logged losses of a mixture of experts, which have as many numbers as this model layers.
        where: Any = moe_utils if hasattr(moe_utils, "get_moe_layer_wise_logging_tracker") else parallel_state
        where.get_moe_layer_wise_logging_tracker().clear()
        self.model = self.engine = None
        parallel_state.destroy_model_parallel()
        if "torch._dynamo" in sys.modules:
            torch._dynamo.reset()  # another shape would else be compiled for any shape, and be slower
        gc.collect()  # compiled layers refer to themselves
        if device.current().kind == "cuda":
            torch.cuda.empty_cache()
