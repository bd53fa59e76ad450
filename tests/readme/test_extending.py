"""docs/extending.md works: each of its files, changes and commands, on a copy of the kit.

A block with a file name is a file, a `diff` block a change, a `bash` block a command. The `text` block after a
command has parts of the output.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.engine import ROOT

from minimind_mcore.preprocess.indexed import Column

BLOCK = re.compile(r"^```(\w+) ?(\S*)\n(.*?)^```$", re.S | re.M)
PAGES = ("docs/extending.md", "docs/extending_zh.md")
SOURCES = ("minimind_mcore", "models", "preprocess", "converters", "configs", "examples", "requirements")
# What torch with an Intel GPU would answer; tensors are FakeTensorMode's, which need no GPU.
STAND_IN = """
import sys
from types import SimpleNamespace

import torch

for name, value in {"is_available": True, "device_count": 1, "current_device": 0, "get_device_name": "stand-in",
                    "set_device": None, "get_device_properties": SimpleNamespace(total_memory=1 << 34)}.items():
    setattr(torch.xpu, name, lambda *args, value=value: value)
"""
ON_XPU = """
import torch
from minimind_mcore.platform import device

moved = []
torch.Tensor.to = lambda self, *args, **kwargs: moved.append([*map(str, args), *map(str, kwargs.values())])
found = device.setup()
from torch._subclasses.fake_tensor import FakeTensorMode

print(found.kind, found.backend, found.torch_device, torch.cuda.current_device(), torch.cuda.is_available())
with FakeTensorMode():
    made = [torch.zeros(2, device="cuda"), torch.empty(2, device=0), torch.ones(2, device=torch.device("cuda", 0))]
    print({str(tensor.device) for tensor in made})
moved.clear()
torch.ones(2).cuda(), torch.ones(2).to("cuda"), torch.ones(2).to(device="cuda:0"), torch.ones(2).to(torch.float64)
print(moved)
"""


def blocks(page: str) -> list[tuple[str, str, str]]:
    """The code blocks of a page: language, file name (or nothing), text."""
    return BLOCK.findall((ROOT / page).read_text(encoding="utf-8"))


def section(title: str) -> list[tuple[str, str, str]]:
    """The code blocks of one section of the English page."""
    [text] = re.findall(rf"^## {title}\n(.*?)(?=^## |\Z)", (ROOT / PAGES[0]).read_text(encoding="utf-8"), re.S | re.M)
    return BLOCK.findall(text)


def run(command: str, kit: Path, **more: str) -> str:
    """Run a command of the page in the copy; return what it prints."""
    environment = os.environ | {"PYTHON": sys.executable, "DEVICE": "cpu", "PYTHONPATH": "", "MPLBACKEND": "Agg"} | more
    done = subprocess.run(
        ["bash", "-c", command], cwd=kit, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr


def follow(title: str, kit: Path, **more: str) -> None:
    """Do what a section says, and compare the outputs."""
    printed = ""
    for language, name, text in section(title):
        if language in ("python", "json"):
            (kit / name).parent.mkdir(exist_ok=True)
            (kit / name).write_text(text, encoding="utf-8")
        elif language == "diff":
            subprocess.run(["git", "apply", "-"], input=text, text=True, cwd=kit, check=True)
        elif language == "bash":
            printed = run(text, kit, **more)
        else:
            for line in text.splitlines():
                assert line in printed, f"expected {line!r}, found:\n{printed}"


@pytest.fixture
def kit(tmp_path: Path, tokenizer: str) -> Path:
    """A copy of the kit's code, with this Python as its .venv's."""
    copy = tmp_path / "kit"
    ignored = shutil.ignore_patterns("__pycache__")
    for name in SOURCES:
        shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=ignored)
    for program in ROOT.glob("*.py"):
        shutil.copy2(program, copy)
    (copy / ".venv/bin").mkdir(parents=True)
    (copy / ".venv/bin/python").write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    (copy / ".venv/bin/python").chmod(0o755)
    (copy / "data").mkdir()
    shutil.copytree(tokenizer, copy / "data/tokenizer")
    return copy


def test_a_reward(kit: Path) -> None:
    follow("A reward", kit)


def test_a_rollout_function(kit: Path) -> None:
    follow("A rollout function", kit)


def test_an_algorithm(kit: Path) -> None:
    follow("An algorithm", kit)
    # The page's functions and the named algorithm, by sums over plain numbers.
    program = """
import json, torch, my_algorithm
from minimind_mcore.rl.algorithms.advantages import ADVANTAGES
rewards, mask = torch.tensor([1.0, 0.5, 0.0, 2.0, 2.0, 5.0]), torch.ones(6, 2)
mask[:5, 1] = 0
mine = my_algorithm.optimal_baseline(rewards, mask, 3, spread="none")
named = ADVANTAGES["opo"](rewards, mask, 3, spread="none")
logp = torch.tensor([[-1.0, -3.0, -9.0]], requires_grad=True)
loss, cut = my_algorithm.gmpo(
    logp, torch.tensor([[-1.1, -3.4, -1.0]]), torch.tensor([[2.0, 2.0, 0.0]]), torch.tensor([[1.0, 1.0, 0.0]]),
    clip_low=0.2, clip_high=0.2,
)
(loss[0, :2].sum() / 2).backward()
print(json.dumps([mine[:, 0].tolist(), named[:, 0].tolist(), loss[0, :2].tolist(), logp.grad[0].tolist()]))
"""
    (kit / "values.py").write_text(program)
    mine, named, loss, gradient = json.loads(run(f'"{sys.executable}" values.py', kit))
    assert mine == pytest.approx([0.5, 0, -0.5, -1.5, -1.5, 1.5]) and named == pytest.approx(mine)
    ratio = math.exp((0.1 + 0.2) / 2)  # the second token's log-ratio is 0.4: it is clipped and has no gradient
    assert loss == pytest.approx([-2 * ratio] * 2)
    assert gradient == pytest.approx([-2 * ratio / 2, 0, 0])


def test_a_model(kit: Path) -> None:
    follow("A model", kit)
    assert run(f'"{sys.executable}" -m minimind_mcore.models.presets mini192', kit) == run(
        f'"{sys.executable}" -m minimind_mcore.models.presets my_model/config.json', kit
    ).replace("--max-position-embeddings\n2048", "--max-position-embeddings\n32768")


def test_a_data_handler(kit: Path, tokenizer: str) -> None:
    from transformers import AutoTokenizer

    follow("A data handler", kit)
    ids = Column(kit / "data/forum_packed_input_ids_document")
    assert len(ids) == 1
    text = AutoTokenizer.from_pretrained(tokenizer).decode(ids[0])
    assert "What is 5 + 7?\nI need the sum." in text and "12" in text and "13" not in text


def test_a_device(kit: Path, tmp_path: Path) -> None:
    (tmp_path / "stand-in").mkdir()
    (tmp_path / "stand-in/sitecustomize.py").write_text(STAND_IN)
    follow("A device", kit, PYTHONPATH=str(tmp_path / "stand-in"))
    (kit / "on_xpu.py").write_text(ON_XPU)
    printed = run(f'"{sys.executable}" on_xpu.py', kit, DEVICE="xpu", PYTHONPATH=str(tmp_path / "stand-in"))
    assert printed.splitlines() == [
        "xpu xccl xpu:0 0 True", "{'xpu:0'}", "[['xpu', 'False'], ['xpu'], ['xpu:0'], ['torch.float64']]",
    ]  # fmt: skip


def test_both_languages_have_the_same_code() -> None:
    assert blocks(PAGES[0]) == blocks(PAGES[1])
