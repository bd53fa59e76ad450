"""Initialize process groups and random seeds."""

from __future__ import annotations

import datetime
import os
import random
import sys
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch
import torch.distributed as dist

from minimind_mcore import hosts
from minimind_mcore.errors import UserError
from minimind_mcore.platform import device, patches, ranks
from minimind_mcore.storage import writing
from minimind_mcore.training.config import TrainConfig

# liveness.py reports a stuck rank after --distributed-timeout-minutes. Collectives time out this much later.
GRACE_MINUTES = 2
OTHER_FILE = "give another file with --log-file (LOG_DIR)"


def world_size() -> int:
    """Return the number of processes from torchrun's environment, or 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def initialize(config: TrainConfig) -> None:
    """Join the process group, create Megatron's groups for the layout, and seed every generator."""
    from megatron.core import parallel_state, tensor_parallel

    layout = config.layout
    minutes = config.parallel.distributed_timeout_minutes + GRACE_MINUTES
    if not dist.is_initialized():
        for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}.items():
            os.environ.setdefault(name, value)
        backend = device.backend(config.parallel.distributed_backend)
        if backend != device.current().backend:  # gloo on a GPU
            _require_simple(config)
            patches.reduce_one_by_one()
        with hosts.port_errors(os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]):
            dist.init_process_group(backend, timeout=datetime.timedelta(minutes=minutes))
    parallel_state.initialize_model_parallel(
        layout.tp, layout.pp, layout.vpp, expert_model_parallel_size=layout.ep, distributed_timeout_minutes=minutes
    )
    # Every pipeline stage has another seed for dropout, as in Megatron. Weights have generators of their own.
    seed = config.data.seed + 100 * parallel_state.get_pipeline_model_parallel_rank()
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    tensor_parallel.model_parallel_cuda_manual_seed(seed)


def _require_simple(config: TrainConfig) -> None:
    """Refuse a layout that gloo cannot run on a GPU.

    gloo can only all-reduce, broadcast and gather GPU tensors (torch 2.7 to 2.13, ProcessGroupGloo.cpp).

    Raises:
        UserError: a flag needs another collective. The message names the flags.
    """
    unsupported = {
        "--pipeline-model-parallel-size": config.layout.pp > 1,
        "--expert-model-parallel-size": config.layout.ep > 1,
        "--sequence-parallel": config.parallel.sequence_parallel,
        "--use-distributed-optimizer": config.parallel.use_distributed_optimizer,
        "--overlap-grad-reduce": config.parallel.overlap_grad_reduce,
        "--ckpt-format torch_dist": config.checkpoint.ckpt_format == "torch_dist" and bool(config.checkpoint.save),
    }
    if flags := [flag for flag, given in unsupported.items() if given]:
        raise UserError(
            f"--distributed-backend gloo on a GPU does not support {', '.join(flags)}: leave them out, or give every "
            "process a GPU of its own and leave out --distributed-backend"
        )


class Tee:
    """Standard output that is also written to a file."""

    def __init__(self, stream: TextIO, path: str) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.stream, self.file = stream, open(path, "a", encoding="utf-8")  # noqa: SIM115  (open until the process ends)

    def write(self, text: str) -> int:
        """Write to both."""
        with writing(self.path, OTHER_FILE):
            self.file.write(text)
        return self.stream.write(text)

    def flush(self) -> None:
        """Flush both."""
        with writing(self.path, OTHER_FILE):
            self.file.flush()
        self.stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def log_to(path: str | None) -> None:
    """Also write the output of the main rank to `path`."""
    if path and ranks.is_main():
        with writing(Path(path), OTHER_FILE):
            tee: Any = Tee(sys.stdout, path)
        sys.stdout = tee


def finish() -> None:
    """Destroy the process groups: a rank that exits without doing so can hang the others."""
    from megatron.core import parallel_state

    if dist.is_initialized():
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
