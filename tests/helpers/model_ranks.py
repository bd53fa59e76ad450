"""Build models as the ranks of a training hold them, and measure each: a program that tests of forecasts run.

    python -m helpers.model_ranks < jobs.json

A job is [world size, flags]. For each job the program prints a list as JSON, with one entry per rank: its parameters,
and the bytes of the tensors that autograd keeps of one forward pass (0 with several ranks).
"""

from __future__ import annotations

import json
import os
import sys

import torch

from minimind_mcore import arguments
from minimind_mcore.hosts import free_port
from minimind_mcore.platform import device
from minimind_mcore.training import distributed
from minimind_mcore.training.config import TrainConfig
from minimind_mcore.validation import validate


def measure(world: int, flags: list[str]) -> tuple[int, int]:
    """Return the numbers of this rank."""
    args = arguments.parse(flags, posttrain=True)
    config = TrainConfig.from_args(args, validate(args, world))
    device.setup()
    distributed.initialize(config)
    from minimind_mcore.training.job import Job
    from minimind_mcore.training.model import build_chunks

    chunks = build_chunks(config, Job(config))
    parameters = sum(p.numel() for chunk in chunks for p in chunk.parameters())
    kept: dict[int, torch.UntypedStorage] = {}
    own = {p.untyped_storage().data_ptr() for chunk in chunks for p in chunk.parameters()}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor

    if world == 1:
        shape = (config.schedule.micro_batch_size, config.data.seq_length)
        tokens = torch.randint(0, config.architecture.vocab_size, shape)
        positions = torch.arange(shape[1]).expand(shape)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            chunks[0](tokens, positions, None, labels=tokens)
    return parameters, sum(storage.nbytes() for storage in kept.values())


def run(world: int, flags: list[str]) -> list[tuple[int, int]]:
    """Fork the ranks of a job, and return their numbers."""
    os.environ |= {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    pipes = []
    for rank in range(world):
        reader, writer = os.pipe()
        if os.fork() == 0:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            os.write(writer, json.dumps(measure(world, flags)).encode())
            os._exit(0)
        os.close(writer)
        pipes.append(reader)
    found = [tuple(json.loads(os.read(reader, 1000) or b"[]")) for reader in pipes]
    for _ in pipes:
        os.wait()
    return found


if __name__ == "__main__":
    print(json.dumps([run(world, flags) for world, flags in json.load(sys.stdin)]))
