"""Operations of a training step that make the host wait for a GPU: those that read a tensor's values."""

from __future__ import annotations

import json
import os
import subprocess
import sys

from helpers.engine import ROOT

STEPS = """
import collections, json, sys
sys.path.append(sys.argv[1])
import torch
from minimind_mcore.platform import device
device.setup()
torch.set_num_threads(1)
from torch.utils._python_dispatch import TorchDispatchMode
from native_engine import NativeEngine
from minimind_mcore.models.presets import get_preset

WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "_unique2", "unique_dim")

class Recorder(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name in WAITING:
            found[name] += 1
        return function(*args, **(kwargs or {}))

for micro_batches in (1, 3):
    engine = NativeEngine(get_preset("minimind3_tiny").replace(vocab_size=64), 2, 16, True, micro_batches)
    ids = torch.randint(0, 64, (2 * micro_batches, 17), generator=torch.Generator().manual_seed(1))
    engine.step(ids)
    found = collections.Counter()
    with Recorder():
        engine.step(ids)
    engine.close()
    print(json.dumps(found))
"""


def test_a_step_of_a_dense_model_reads_two_values() -> None:
    """The gradient norm, and whether the losses are finite: not more for more layers or micro-batches."""
    command = [sys.executable, "-c", STEPS, str(ROOT / "benchmarks")]
    environment = os.environ | {"DEVICE": "cpu", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert found == [{"_local_scalar_dense": 2}] * 2
