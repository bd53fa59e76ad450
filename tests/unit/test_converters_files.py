"""Which files of tensors are read: the safetensors library's verdict counts, and weights are floating-point numbers."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from helpers.weights_on_disk import SMALL, assert_same_bits, state_dict, write_hf
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from minimind_mcore.checkpoint.layout import ParallelLayout
from minimind_mcore.checkpoint.opening import open_source
from minimind_mcore.checkpoint.tensors import open_safetensors
from minimind_mcore.converters.convert import convert
from minimind_mcore.converters.main import main_v2
from minimind_mcore.converters.megatron import MegatronTarget
from minimind_mcore.errors import UserError

WEIGHT_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def library_verdict(path: Path) -> dict[str, Tensor] | None:
    """The tensors that the safetensors library reads, None where it refuses the file."""
    try:
        return load_file(path)
    except (SafetensorError, KeyError, AttributeError):  # dtypes that it knows and its torch side does not
        return None


def our_verdict(path: Path) -> dict[str, Tensor] | None:
    try:
        file = open_safetensors(path)
    except UserError:
        return None
    return {name: file.read(name) for name in file.entries}


def assert_same_verdict(path: Path, what: str) -> None:
    expected, found = library_verdict(path), our_verdict(path)
    if expected is not None and any(tensor.dtype not in WEIGHT_DTYPES for tensor in expected.values()):
        expected = None  # these are valid files, but not weights
    assert (found is None) == (expected is None), f"{what}: the library {'refuses' if expected is None else 'reads'} it"
    if found is not None and expected is not None:
        assert_same_bits(found, expected)


def test_flipped_bits_of_a_header_get_the_verdict_of_the_library(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    kinds = list(enumerate(WEIGHT_DTYPES))
    save_file({f"layers.{n}.{k}": torch.full((4, n + 1), 0.5 + n + k).to(d) for n in range(2) for k, d in kinds}, path)
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    for position in range(8, 8 + length):
        for bit in (0, 1, 4):
            damaged = bytearray(content)
            damaged[position] ^= 1 << bit
            path.write_bytes(damaged)
            assert_same_verdict(path, f"bit {bit} of byte {position}: {damaged[max(8, position - 9) : position + 9]!r}")


@pytest.mark.parametrize(
    "offsets",
    {
        "overlapping": ([0, 16], [8, 24], 24),
        "reversed": ([16, 0], [16, 32], 32),
        "short": ([0, 8], [8, 24], 24),
        "long": ([0, 24], [24, 40], 40),
        "a gap": ([0, 16], [20, 36], 36),
        "behind the end": ([0, 16], [16, 32], 24),
        "bytes left over": ([0, 16], [16, 32], 40),
        "the same twice": ([0, 16], [0, 16], 16),
        "valid": ([0, 16], [16, 32], 32),
        "valid, in the other order": ([16, 32], [0, 16], 32),
    }.items(),
    ids=lambda item: item[0],
)
def test_offsets_get_the_verdict_of_the_library(
    offsets: tuple[str, tuple[list[int], list[int], int]], tmp_path: Path
) -> None:
    name, (first, second, size) = offsets
    header = {
        "a": {"dtype": "F32", "shape": [4], "data_offsets": first},
        "b": {"dtype": "F32", "shape": [2, 2], "data_offsets": second},
    }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + torch.arange(size // 4).float().numpy().tobytes())
    assert (our_verdict(path) is not None) == name.startswith("valid")
    assert_same_verdict(path, name)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int8, torch.bool, torch.complex64, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("form", ["pth", "bin", "safetensors", "Megatron"])
def test_weights_that_are_not_floating_point_numbers_are_refused(dtype: torch.dtype, form: str, tmp_path: Path) -> None:
    config = SMALL["minimind3"]
    state = state_dict(config, "native" if form == "pth" else "hf")
    state["model.norm.weight"] = state["model.norm.weight"].to(dtype)
    path = tmp_path / "full_sft.pth"
    if form == "pth":
        torch.save(state, path)
    else:
        path = write_hf(tmp_path / "hf", config, state if form == "safetensors" else {})
    if form == "bin":
        (path / "model.safetensors").unlink()
        torch.save(state, path / "pytorch_model.bin")
    name = "model.norm.weight"
    if form == "Megatron":
        (path / "model.safetensors").unlink()
        whole_hf = write_hf(tmp_path / "whole", config, state_dict(config, "hf"))
        source = open_source(whole_hf)
        path = convert(source, MegatronTarget(source, ParallelLayout()), tmp_path / "mg").path
        file = next(path.rglob("model_optim_rng.pt"))
        content = torch.load(file, weights_only=False)
        name = "decoder.final_layernorm.weight"
        content["model"][name] = content["model"][name].to(dtype)
        torch.save(content, file)
        (file.parent.parent / "manifest.json").unlink()
    with pytest.raises(UserError, match=f"{re.escape(name)} has dtype .*, expected one of .*F32"):
        main_v2(["--load-dir", str(path), "--save-dir", str(tmp_path / "out"), "--save-model-type", "hf"])
    assert not (tmp_path / "out").exists()


IN_MEGATRON = "decoder.layers.0.mlp.linear_fc2.weight"


def quantized(values: Tensor) -> Tensor:
    return torch.quantize_per_tensor(values, 0.1, 0, torch.qint8)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["quantized", "sparse", "sparse csr"])
@pytest.mark.parametrize("form", ["pth", "bin", "Megatron"])
def test_tensors_of_another_form_are_refused_by_name(kind: str, form: str, tmp_path: Path) -> None:
    change = {"quantized": quantized, "sparse": Tensor.to_sparse, "sparse csr": Tensor.to_sparse_csr}[kind]
    config, name = SMALL["minimind3"], "model.layers.0.mlp.up_proj.weight"
    state = state_dict(config, "native" if form == "pth" else "hf")
    path = tmp_path / "full_sft.pth"
    if form == "Megatron":
        source = open_source(write_hf(tmp_path / "hf", config, state))
        path, name = convert(source, MegatronTarget(source, ParallelLayout()), tmp_path / "mg").path, IN_MEGATRON
        file = next(path.rglob("model_optim_rng.pt"))
        content = torch.load(file, weights_only=False)
        content["model"][name] = change(content["model"][name].float())
        torch.save(content, file)
        (file.parent.parent / "manifest.json").unlink()
    else:
        state[name] = change(state[name].float())
        if form == "bin":
            path = write_hf(tmp_path / "hf", config, {})
            (path / "model.safetensors").unlink()
        torch.save(state, path / "pytorch_model.bin" if form == "bin" else path)
    with pytest.raises(UserError, match=f"{re.escape(name)} is a {kind.split()[0]} tensor; expected a dense tensor"):
        main_v2(["--load-dir", str(path), "--save-dir", str(tmp_path / "out"), "--save-model-type", "hf"])
    assert not (tmp_path / "out").exists()
