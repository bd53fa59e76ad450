"""The transfer of weights to the rollout engines needs little of the object store."""

from __future__ import annotations

import json
import os
import subprocess
import sys

from helpers.engine import ROOT


def test_few_buckets_are_in_the_object_store_at_a_time() -> None:
    """66 MiB from two tensor-parallel ranks to two engines, in buckets of at most 4 MiB and an embedding of 6.3 MiB.

    Each engine holds two buckets, and each rank the last two that it gave.
    """
    command = [sys.executable, str(ROOT / "benchmarks/weight_sync.py"), "--hidden-size", "256", "--layers", "16"]
    done = subprocess.run(
        [*command, "--bucket-mib", "4"], capture_output=True, text=True, timeout=280,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert not found["wrong"] and found["buckets"] >= 16
    assert 4 < found["peak_mib"] < 30 < 60 < found["weights_mib"]
