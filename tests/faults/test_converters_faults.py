"""A conversion that cannot be right says why by name, exits with 1, and leaves nothing that looks finished."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.disks import small_disk
from helpers.engine import ROOT
from helpers.weights_on_disk import SMALL, config_json, read_hf, state_dict, write_hf
from safetensors.torch import load_file, save_file

from minimind_mcore.checkpoint.layout import ParallelLayout
from minimind_mcore.checkpoint.opening import open_source
from minimind_mcore.checkpoint.tensors import TensorWriter
from minimind_mcore.converters import convert as convert_module
from minimind_mcore.converters.hf import HFTarget
from minimind_mcore.converters.main import main_v1, main_v2
from minimind_mcore.converters.megatron import MegatronTarget
from minimind_mcore.errors import UserError

CONFIG = SMALL["minimind3"]
Damage = Callable[[Path], object]


def convert(load: Path, save: Path, *flags: str, to: str = "hf") -> None:
    main_v2(["--load-dir", str(load), "--save-dir", str(save), "--save-model-type", to, *flags])


@pytest.fixture
def hf(tmp_path: Path) -> Path:
    return write_hf(tmp_path / "hf", CONFIG, state_dict(CONFIG, "hf"))


@pytest.fixture
def mcore(hf: Path, tmp_path: Path) -> Path:
    source = open_source(hf)
    return convert_module.convert(source, MegatronTarget(source, ParallelLayout(tp=2, pp=2)), tmp_path / "mcore").path


def rank_file(mcore: Path, folder: str = "mp_rank_01_000") -> Path:
    return mcore / "iter_0000001" / folder / "model_optim_rng.pt"


def edit(path: Path, change: Callable[[Any], Any]) -> None:
    """Change what a file of torch holds; its manifest goes."""
    content = torch.load(path, weights_only=False)
    change(content)
    torch.save(content, path)
    (path.parents[1] / "manifest.json").unlink(missing_ok=True)


def edit_hf(folder: Path, **tensors: torch.Tensor) -> None:
    file = folder / "model.safetensors"
    save_file(load_file(file) | tensors, file)


def flip_last_byte(path: Path, before_end: int = 1) -> None:
    with open(path, "r+b") as f:
        f.seek(-before_end, os.SEEK_END)
        byte = f.read(1)
        f.seek(-before_end, os.SEEK_END)
        f.write(bytes([byte[0] ^ 1]))


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size * 2 // 3)


def nan() -> torch.Tensor:
    tensor = torch.ones(CONFIG.hidden_size)
    tensor[3] = float("nan")
    return tensor


def change_model(path: Path, name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    edit(path, lambda content: content["model"].update({name: change(content["model"][name])}))


NORM = "decoder.layers.0.input_layernorm.weight"
HF_DAMAGE: dict[str, tuple[Damage, str]] = {
    "no weights": (lambda p: (p / "model.safetensors").unlink(), "found a config.json and no weights"),
    "truncated": (lambda p: truncate(p / "model.safetensors"), r"model\.safetensors: truncated: [\d,]+ bytes, its"),
    "not safetensors": (lambda p: (p / "model.safetensors").write_bytes(b"<html>"), "or not a safetensors file"),
    "extra tensor": (lambda p: edit_hf(p, surplus=torch.ones(2)), "1 unknown tensors: surplus"),
    "NaN": (
        lambda p: edit_hf(p, **{"model.norm.weight": nan()}),
        r"final_layernorm\.weight: has NaN or infinite values",
    ),
    "wrong shape": (
        lambda p: edit_hf(p, **{"model.norm.weight": torch.ones(5)}),
        r"model\.norm\.weight: found shape \(5,\), expected \(32,\) from the model config",
    ),
    "wrong config": (
        lambda p: (p / "config.json").write_text(json.dumps(config_json(CONFIG.replace(ffn_hidden_size=64)))),
        r"mlp\.gate_proj\.weight: found shape \(48, 32\), expected \(64, 32\)",
    ),
    "another architecture": (
        lambda p: (p / "config.json").write_text(json.dumps(config_json(CONFIG) | {"model_type": "gpt2"})),
        "model_type: found 'gpt2'",
    ),
    "shard missing": (
        lambda p: (
            (p / "model.safetensors").rename(p / "one.safetensors"),
            (p / "model.safetensors.index.json").write_text(
                json.dumps({"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}})
            ),
        ),
        r"index\.json names two\.safetensors, which is missing",
    ),
    "not a model": (lambda p: (p / "config.json").unlink(), "found model.safetensors; expected a Hugging Face"),
}
MCORE_DAMAGE: dict[str, tuple[Damage, str]] = {
    "rank missing": (
        lambda p: shutil.rmtree(rank_file(p).parent),
        "missing mp_rank_01_000/model_optim_rng.pt; it was saved with TP=2 PP=2",
    ),
    "rank of another layout": (
        lambda p: shutil.copytree(rank_file(p).parent, p / "iter_0000001" / "mp_rank_02_000"),
        "mp_rank_02_000 does not belong",
    ),
    "truncated": (lambda p: truncate(rank_file(p)), "mp_rank_01_000/model_optim_rng.pt: truncated"),
    "flipped byte": (
        lambda p: flip_last_byte(rank_file(p), 4000),
        r"mp_rank_01_000/model_optim_rng\.pt",
    ),
    "extra tensor": (
        lambda p: edit(rank_file(p), lambda content: content["model"].update(surplus=torch.ones(2))),
        "1 unknown tensors: model/surplus",
    ),
    "tensor missing": (
        lambda p: edit(rank_file(p), lambda content: content["model"].pop(NORM)),
        r"1 missing tensors: model/decoder\.layers\.0\.input_layernorm",
    ),
    "copies that differ": (
        lambda p: change_model(rank_file(p), NORM, lambda t: t + 1),
        r"layers\.0\.input_layernorm\.weight: the ranks' copies differ .*mp_rank_01_000",
    ),
    "NaN": (
        lambda p: change_model(
            rank_file(p), "decoder.layers.0.mlp.linear_fc2.weight", lambda t: t.clone().fill_(float("inf"))
        ),
        r"layers\.0\.mlp\.linear_fc2\.weight: has NaN or infinite values",
    ),
    "tracker without directory": (
        lambda p: (p / "latest_checkpointed_iteration.txt").write_text("500"),
        r"names '500', but there is no iter_0000500",
    ),
    "Megatron-legacy": (
        lambda p: edit(
            rank_file(p, "mp_rank_00_000"), lambda content: content.update(model={"language_model": {"encoder": {}}})
        ),
        r"a Megatron-legacy checkpoint \(language_model\)",
    ),
}


@pytest.mark.parametrize("name", HF_DAMAGE)
def test_damage_of_a_hugging_face_directory_is_named(name: str, hf: Path, tmp_path: Path) -> None:
    damage, message = HF_DAMAGE[name]
    damage(hf)
    before = set(tmp_path.iterdir())
    with pytest.raises(UserError, match=message):
        convert(hf, tmp_path / "out", to="mg")
    assert set(tmp_path.iterdir()) == before


@pytest.mark.parametrize("name", MCORE_DAMAGE)
def test_damage_of_a_megatron_checkpoint_is_named(name: str, mcore: Path, tmp_path: Path) -> None:
    damage, message = MCORE_DAMAGE[name]
    damage(mcore)
    before = set(tmp_path.iterdir())
    with pytest.raises(UserError, match=message):
        convert(mcore, tmp_path / "out", "--load-model-type", "mg")
    assert set(tmp_path.iterdir()) == before


def test_a_flipped_byte_is_noticed_with_and_without_a_manifest(hf: Path, tmp_path: Path) -> None:
    source = open_source(hf)
    converted = convert_module.convert(source, HFTarget(source, native=False, folder=None), tmp_path / "one").path
    flip_last_byte(converted / "model.safetensors")
    with pytest.raises(UserError, match=r"model\.safetensors: content differs from its SHA-256 in manifest\.json"):
        convert(converted, tmp_path / "out", to="mg")
    pth = tmp_path / "full_sft_32.pth"  # no manifest, but a zip file has checksums of its own
    torch.save(state_dict(CONFIG, "native"), pth)
    content = bytearray(pth.read_bytes())
    at = content.index(state_dict(CONFIG, "native")["model.layers.2.mlp.up_proj.weight"].numpy().tobytes())
    content[at + 100] ^= 4
    pth.write_bytes(content)
    with pytest.raises(UserError, match=r"layers\.2\.mlp\.up_proj\.weight does not have the CRC-32"):
        convert(pth, tmp_path / "out", to="mg")
    assert not (tmp_path / "out").exists()


REFUSED: dict[str, tuple[list[str], str]] = {
    "TP and heads": (
        ["--target-tensor-parallel-size", "4"],
        "--target-tensor-parallel-size 4 does not divide the 2 key-value heads",
    ),
    "layers": (
        ["--target-pipeline-parallel-size", "3"],
        "--target-pipeline-parallel-size 3 does not divide 4 layers; choose a divisor, or give --num-layer-list",
    ),
    "virtual stages": (
        ["--target-pipeline-parallel-size", "2", "--num-layers-per-virtual-pipeline-stage", "2"],
        "does not divide the 2 layers of a stage into two parts or more",
    ),
    "layer list": (
        ["--target-pipeline-parallel-size", "2", "--num-layer-list", "1,2"],
        "--num-layer-list 1,2: expected 2 numbers that add to 4",
    ),
    "list and noop": (
        ["--target-pipeline-parallel-size", "2", "--num-layer-list", "1,4", "--noop-layers", "0"],
        "exclude each other",
    ),
    "noop": (["--noop-layers", "9"], r"--noop-layers \[9\]: expected numbers from 0 to 4"),
    "experts of a dense model": (["--target-expert-parallel-size", "2"], "this model has no experts"),
    "grouped experts of a dense model": (["--moe-grouped-gemm"], "--moe-grouped-gemm: this model has no experts"),
    "model type": (["--model-type-hf", "qwen3-moe"], "this name means qwen3_moe, but the model is qwen3"),
    "foreign model": (["--model-type-hf", "deepseek3"], "not an architecture of MiniMind"),
    "source type": (["--load-model-type", "mg"], "--load-model-type mg: found Hugging Face qwen3"),
    "dtype": (["--params-dtype", "int8"], "--params-dtype int8: expected one of fp32, bf16, fp16"),
    "typing error": (["--target-tensor-paralel-size", "2"], "did you mean --target-tensor-parallel-size"),
    "another architecture's flag": (["--mtp-num-layers", "1"], "--mtp-num-layers: a MiniMind model has no use"),
    "Transformer Engine": (["--transformer-impl", "transformer_engine"], "use local"),
    "layers stated": (["--num-layers", "8"], "--num-layers 8: the model has 4"),
    "adapters that are not there": (["--lora-r", "8"], "found no LoRA adapters"),
    "larger vocabulary": (["--true-vocab-size", "200"], "expected 200 rows, but the weights have"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_is_refused(name: str, hf: Path, tmp_path: Path) -> None:
    flags, message = REFUSED[name]
    with pytest.raises(UserError, match=message):
        convert(hf, tmp_path / "out", *flags, to="mg")
    assert not (tmp_path / "out").exists()


def test_megatron_legacy_is_refused_by_name(hf: Path, tmp_path: Path) -> None:
    flags = [
        "--model-type",
        "GPT",
        "--load-dir",
        str(hf),
        "--save-dir",
        str(tmp_path / "out"),
        "--tokenizer-model",
        "x",
    ]
    for legacy in ([], ["--use-mcore-models", "--save-to-legacy"], ["--use-mcore-models", "--load-from-legacy"]):
        with pytest.raises(UserError, match="a Megatron-legacy model"):
            main_v1([*flags, *legacy])


def test_the_tokenizer_may_be_left_out(mcore: Path, hf: Path, tmp_path: Path) -> None:
    """Of convert_ckpt.py, as of convert_ckpt_v2.py: the output is the same."""
    flags = ["--model-type", "GPT", "--use-mcore-models", "--load-dir", str(mcore), "--save-model-type", "hf"]
    main_v1([*flags, "--save-dir", str(tmp_path / "out")])
    convert(mcore, tmp_path / "other")
    found, expected = (folder / "model.safetensors" for folder in (tmp_path / "out" / "mg2hf", tmp_path / "other"))
    assert found.read_bytes() == expected.read_bytes()


def test_a_config_of_another_model_is_refused(mcore: Path, hf: Path, tmp_path: Path) -> None:
    other = write_hf(tmp_path / "other", CONFIG, {}, num_key_value_heads=4)
    with pytest.raises(UserError, match="num_query_groups is 2 in the checkpoint and 4 in the given config"):
        convert(mcore, tmp_path / "out", "--hf-cfg-dir", str(other))


def test_nothing_is_replaced(hf: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").touch()
    with pytest.raises(UserError, match="exists already"):
        convert(hf, tmp_path / "out", to="mg")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["precious"]


# The self-check


def test_a_byte_written_wrong_is_noticed(hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = TensorWriter.write

    def write_wrong(self: TensorWriter, name: str, tensor: torch.Tensor, *more: int) -> None:
        write(self, name, tensor.flip(0) if name.endswith("layers.1.mlp.linear_fc2.weight") else tensor, *more)

    monkeypatch.setattr(TensorWriter, "write", write_wrong)
    with pytest.raises(UserError, match=r"not the same when read back: decoder\.layers\.1\.mlp\.linear_fc2"):
        convert(hf, tmp_path / "out", to="mg")
    assert not (tmp_path / "out").exists()


def test_a_tensor_left_out_is_noticed(hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = MegatronTarget.write

    def forget(self: MegatronTarget, name: str, whole: torch.Tensor) -> None:
        if name != "decoder.final_layernorm.weight":
            write(self, name, whole)

    monkeypatch.setattr(MegatronTarget, "write", forget)
    with pytest.raises(UserError, match=r"1 tensors not written.*decoder\.final_layernorm\.weight"):
        convert(hf, tmp_path / "out", to="mg")
    assert not (tmp_path / "out").exists()


def test_a_tensor_read_twice_is_noticed(hf: Path, tmp_path: Path) -> None:
    source = open_source(hf)
    source.files[0].read("model.norm.weight")
    with pytest.raises(UserError, match=r"read twice, in the source: model\.safetensors: model\.norm\.weight"):
        convert_module.convert(source, MegatronTarget(source, ParallelLayout()), tmp_path / "out")


def test_logits_that_differ_are_a_miss(hf: Path, tmp_path: Path) -> None:
    program = (
        "from minimind_mcore.converters import main, probe; from minimind_mcore.errors import run; "
        "megatron = probe.megatron_logits; probe.megatron_logits = lambda *a: megatron(*a) + 0.01; run(main.main_v2)"
    )
    flags = ["--load-dir", str(hf), "--save-dir", str(tmp_path / "out"), "--verify", "logits"]
    done = subprocess.run([sys.executable, "-c", program, *flags], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "the logits differ by 0.01" in done.stderr, done.stdout + done.stderr
    assert not (tmp_path / "out").exists()


# Kills and disks


@pytest.mark.parametrize("where", ["stream", "verify", "publish"])
def test_a_killed_conversion_leaves_nothing_and_the_next_one_works(where: str, hf: Path, tmp_path: Path) -> None:
    program = (
        "import os; from minimind_mcore.converters import convert as c, main; "
        f"work = c.{where}\n"
        "def die(*a):\n    if c.__dict__.get('once'): return\n    {}\n"
        f"c.{where} = die\n"
        "main.main_v2()"
    ).format("work(*a) if 'stream' in work.__name__ else None; os.kill(os.getpid(), 9)")
    flags = ["--load-dir", str(hf), "--save-dir", str(tmp_path / "out")]
    done = subprocess.run([sys.executable, "-c", program, *flags], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    left = [p.name for p in tmp_path.iterdir() if p != hf]
    assert len(left) == 1 and left[0].startswith(".out.tmp-")  # hidden, and named after a process that is no more
    convert(hf, tmp_path / "out", to="mg")
    assert {p.name for p in tmp_path.iterdir()} == {"hf", "out"}
    convert(tmp_path / "out", tmp_path / "back", "--load-model-type", "mg")
    assert read_hf(tmp_path / "back").keys() == read_hf(hf).keys()


def test_ctrl_c_leaves_nothing(hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(convert_module, "verify", interrupt)
    with pytest.raises(KeyboardInterrupt):
        convert(hf, tmp_path / "out", to="mg")
    assert {p.name for p in tmp_path.iterdir()} == {"hf"}


@pytest.mark.parametrize("form", ["torch", "torch_dist", "pth", "hf"])
@pytest.mark.parametrize("checked", [True, False], ids=["before writing", "while writing"])
def test_a_full_disk_is_said_and_left_clean(
    form: str, checked: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = CONFIG.replace(vocab_size=32000)  # 4 MB
    hf = write_hf(tmp_path / "hf", config, state_dict(config, "hf"))
    if not checked:  # somebody else fills it meanwhile
        monkeypatch.setattr(convert_module, "require_space", lambda *_: None)
    with small_disk(tmp_path / "disk", 2) as disk:
        out = disk / ("out.pth" if form == "pth" else "out")
        to, flags = ("hf", []) if form in ("pth", "hf") else ("mg", ["--ckpt-format", form])
        message = "MiB are needed and" if checked else "disk full while writing"
        if form == "torch_dist" and not checked:  # megatron-core's process groups are of a process of its own
            command = [sys.executable, "-c", _DIST_PROGRAM, "--load-dir", str(hf), "--save-dir", str(out), *flags]
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
            assert done.returncode == 1 and message in done.stderr, done.stderr
        else:
            with pytest.raises(UserError, match=message):
                convert(hf, out, *flags, to=to)
        assert list(disk.iterdir()) == []


_DIST_PROGRAM = (
    "from minimind_mcore.converters import convert as c, main; from minimind_mcore.errors import run; "
    "c.require_space = lambda *a: None; run(main.main_v2)"
)


def test_an_error_is_one_message_and_exit_status_1(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "convert_ckpt_v2.py"), "--load-dir", str(tmp_path / "no"), "--save-dir", "x"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.returncode == 1 and done.stderr.startswith("error: ") and "does not exist" in done.stderr
