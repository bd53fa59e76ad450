"""The stand-in for torch_npu: its operators are right, and it is nowhere where it was not asked for."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from helpers.engine import ROOT

PLACE = ROOT / "rehearsal/minimind_mcore_rehearsal/python"


def run(*command: str, path: list[Path]) -> subprocess.CompletedProcess[str]:
    """Run Python with these folders on its path, and no device asked for."""
    environment = {name: value for name, value in os.environ.items() if name != "DEVICE"}
    environment |= {
        "PYTHONPATH": os.pathsep.join(map(str, path)),
        "OMP_NUM_THREADS": "1",
        "NPU_EMULATION_STRICT": "raise",
    }
    return subprocess.run(
        [sys.executable, *command], env=environment, capture_output=True, text=True, cwd=ROOT / "tests"
    )


def test_operators_equal_plain_torch() -> None:
    done = run("-m", "pytest", "-q", "-p", "no:cacheprovider", "mindspeed/emulated_operators.py", path=[PLACE])
    assert done.returncode == 0 and " passed" in done.stdout and "failed" not in done.stdout, done.stdout + done.stderr


def test_it_is_asked_for_by_path_alone() -> None:
    code = "import importlib.util as u, minimind_mcore_rehearsal; print(u.find_spec('torch_npu'))"
    done = run("-c", code, path=[ROOT, ROOT / "rehearsal"])
    assert done.stdout.strip() == "None", done.stdout + done.stderr
    done = run("-m", "minimind_mcore_rehearsal", path=[ROOT / "rehearsal"])
    assert done.stdout.strip() == str(PLACE), done.stdout + done.stderr


def test_with_it_the_kit_sees_npus() -> None:
    done = run("-m", "minimind_mcore.platform.device", path=[PLACE, ROOT])
    assert done.stdout.split() == ["npu", "8"], done.stdout + done.stderr


def test_torch_loads_it_and_it_redirects_names_and_backends() -> None:
    code = """
import torch
assert torch.zeros(2, device="npu:1").device.type == "cpu" and torch.npu.device_count() == 8
torch.distributed.init_process_group("hccl", init_method="tcp://127.0.0.1:0", rank=0, world_size=1)
print(torch.distributed.get_backend())
"""
    done = run("-c", code, path=[PLACE])
    assert done.stdout.strip() == "gloo", done.stdout + done.stderr
