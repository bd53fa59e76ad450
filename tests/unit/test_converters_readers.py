"""What is written loads in programs that are not installed here: transformers 4, and MiniMind's own.

Their directories are given by path: TRANSFORMERS_4_DIR (`pip install --no-deps --target DIRECTORY transformers==4.57.6
huggingface_hub==0.36.2 tokenizers==0.22.1`), MINIMIND_DIR (a checkout of MiniMind). Each runs in a process of its own
and must give the logits that the installed transformers gives with the weights that were there before.
"""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.engine import ROOT, TRACKER
from helpers.weights_on_disk import SMALL, read_hf, state_dict, write_hf
from torch import Tensor

from minimind_mcore.checkpoint.layout import ParallelLayout
from minimind_mcore.checkpoint.opening import open_source
from minimind_mcore.converters.convert import convert
from minimind_mcore.converters.hf import HFTarget, PthTarget
from minimind_mcore.converters.megatron import MegatronTarget
from minimind_mcore.converters.probe import directory_logits
from minimind_mcore.models.config import ModelConfig

TRANSFORMERS_4 = """
import sys, torch, transformers
assert transformers.__version__.startswith("4."), transformers.__version__
ids = torch.load("ids.pt")
for name in sys.argv[1:]:
    model, info = transformers.AutoModelForCausalLM.from_pretrained(name, output_loading_info=True)
    assert not any(info.values()), info
    with torch.no_grad():
        torch.save(model.float().eval()(ids).logits, name + ".logits")
"""

# eval_llm.py ends with .half(): left out, so that it is not rounding that is compared.
MINIMIND = """
import os, sys, torch
sys.path.insert(0, os.environ["MINIMIND_DIR"])
sys.argv[1:], (load_from, weight, hidden, layers, moe, output) = [], sys.argv[1:]
import argparse, eval_llm
torch.nn.Module.half = lambda module: module
model, _ = eval_llm.init_model(argparse.Namespace(
    load_from=load_from, save_dir=".", weight=weight, lora_weight="None", hidden_size=int(hidden),
    num_hidden_layers=int(layers), use_moe=int(moe), inference_rope_scaling=False, device="cpu"))
with torch.no_grad():
    torch.save(model.float()(torch.load("ids.pt")).logits, output)
"""

# A torch_dist checkpoint as megatron-core 0.12.1 saves grouped experts (GroupedMLP.sharded_state_dict), which
# MindSpeed-RL does: the experts of a layer share a chunk, and the two halves of fc1 are chunks of their own.
GROUPED = """
import re, sys, torch
from minimind_mcore.platform import device
device.setup()
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from minimind_mcore.converters.megatron import single_process
content = torch.load("grouped/iter_0000001/mp_rank_00/model_optim_rng.pt", weights_only=False)
layers, experts, hidden = (getattr(content["args"], name) for name in ("num_layers", "num_experts", "hidden_size"))
sharded = {}
for name, tensor in content.pop("model").items():
    layer = re.match(r"decoder\\.layers\\.(\\d+)\\.(.*)", name)
    if not layer:
        sharded[name] = ShardedTensor.from_rank_offsets(name, tensor)
        continue
    stack, halves = (0, int(layer[1]), layers), [tensor]
    key = f"decoder.layers.{layer[2]}"
    if name.endswith(("experts.weight1", "experts.weight2")):
        fc1 = name.endswith("1")
        key = f"decoder.layers.mlp.experts.experts.linear_fc{2 - fc1}.weight"
        shape = (experts, hidden, -1) if fc1 else (experts, -1, hidden)
        halves = tensor.view(shape).transpose(-1, -2).chunk(1 + fc1, -2)
    for number, half in enumerate(halves):
        offsets = [(1, 0, 1), (2, number, len(halves))] if "experts.experts" in key else []
        part = ShardedTensor.from_rank_offsets(key, half.contiguous(), stack, *offsets, prepend_axis_num=1)
        sharded[f"{name} {number}"] = part
with single_process():
    dist_checkpointing.save(content | {"model": sharded}, "dist/iter_0000001")
"""


def directory_of(variable: str, what: str) -> Path:
    directory = os.environ.get(variable)
    if not directory:
        pytest.skip(f"{variable} is not set: no {what} to test against")
    return Path(directory).absolute()


def make(folder: Path, config: ModelConfig, ids: Tensor) -> tuple[Path, Tensor]:
    """A Megatron checkpoint, and the logits of transformers with the weights that it was made of."""
    hf = write_hf(folder / "hf", config, state_dict(config, "hf"))
    source = open_source(hf)
    mcore = convert(source, MegatronTarget(source, ParallelLayout(tp=2, pp=2)), folder / "mcore").path
    torch.save(ids, folder / "ids.pt")
    with torch.no_grad():
        return mcore, directory_logits(hf, ids)


def run(program: str, *args: str, folder: Path, **variables: str) -> None:
    environment = os.environ | variables | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder)}
    command = [sys.executable, "-c", program, *args]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


@pytest.mark.timeout(360)
@pytest.mark.parametrize("name", SMALL)
def test_transformers_4_loads_what_is_written(name: str, tmp_path: Path) -> None:
    directory = directory_of("TRANSFORMERS_4_DIR", "transformers 4")
    ids = torch.randint(0, SMALL[name].vocab_size, (2, 24))
    mcore, expected = make(tmp_path, SMALL[name], ids)
    source = open_source(mcore)
    convert(source, HFTarget(source, native=False, folder=None), tmp_path / "output")
    run(TRANSFORMERS_4, "output", folder=tmp_path, PYTHONPATH=str(directory))
    torch.testing.assert_close(torch.load(tmp_path / "output.logits"), expected, atol=1e-5, rtol=0)


@pytest.mark.timeout(360)
@pytest.mark.parametrize("file", [True, False], ids=["pth", "directory"])
@pytest.mark.parametrize("name", ["minimind3", "minimind3_moe"])
def test_eval_llm_of_minimind_loads_what_is_written(name: str, file: bool, tmp_path: Path) -> None:
    directory = directory_of("MINIMIND_DIR", "checkout of MiniMind")
    transformers_4 = directory_of("TRANSFORMERS_4_DIR", "transformers 4, which MiniMind requires,")
    code = directory / "model"  # with its tokenizer; a path with this word is what eval_llm.py takes for a .pth
    folder = tmp_path.parent / f"eval-{name}-{file}".replace("model", "")
    folder.mkdir()
    moe = SMALL[name].moe
    config = SMALL[name].replace(  # of which eval_llm.py can set the width and the depth alone
        vocab_size=6400,
        hidden_size=64,
        num_kv_heads=4,
        ffn_hidden_size=256,
        moe=moe and dataclasses.replace(moe, ffn_hidden_size=256),
    )
    ids = torch.randint(0, config.vocab_size, (2, 24))
    mcore, expected = make(folder, config, ids)
    source = open_source(mcore)
    if file:
        convert(source, PthTarget(source), folder / f"full_sft_64{'_moe' if moe else ''}.pth")
    else:
        convert(source, HFTarget(source, native=True, folder=code, copy_code=True), folder / "native")
    load_from = str(code) if file else str(folder / "native")
    size = ["64", str(config.num_layers), str(int(moe is not None))]
    run(MINIMIND, load_from, "full_sft", *size, "logits", folder=folder, PYTHONPATH=str(transformers_4))
    torch.testing.assert_close(torch.load(folder / "logits"), expected, atol=1e-5, rtol=0)


def test_grouped_experts_of_torch_dist_are_read(tmp_path: Path) -> None:
    config = SMALL["minimind3_moe"]
    state = state_dict(config, "hf")
    source = open_source(write_hf(tmp_path / "hf", config, state))
    convert(source, MegatronTarget(source, ParallelLayout(grouped_experts=True)), tmp_path / "grouped")
    (tmp_path / "dist/iter_0000001").mkdir(parents=True)
    (tmp_path / "dist" / TRACKER).write_text("1")
    run(GROUPED, folder=tmp_path, PYTHONPATH=str(ROOT))
    again = open_source(tmp_path / "dist")
    assert again.kind == "Megatron torch_dist"
    convert(again, HFTarget(again, native=False, folder=None), tmp_path / "back")
    found = read_hf(tmp_path / "back")
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], state[name].to(found[name].dtype)) for name in state)
