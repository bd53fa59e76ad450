"""A checkpoint whose pickle would run code is refused by name on every way in, and nothing of it runs."""

from __future__ import annotations

import argparse
import io
import json
import os
import pickle
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import engine

from minimind_mcore.checkpoint import torch_zip, unpickling
from minimind_mcore.errors import UserError
from minimind_mcore.inputs.flags import build_parser
from minimind_mcore.mindspeed import checkpoints
from minimind_mcore.models.presets import PRESETS

ROOT = Path(__file__).resolve().parents[2]


class Touch:
    """Unpickled without a restriction, creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.path}",)


@pytest.fixture
def witness(tmp_path: Path) -> Path:
    """A file that exists as soon as code of a hostile file has run."""
    return tmp_path / "code-has-run"


def run(program: str, *words: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / program), *map(str, words)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200, check=False)


def poison_torch(file: Path, witness: Path) -> None:
    """Add an object that runs code to what the file holds."""
    content = torch.load(file, weights_only=False)
    content["args"].hook = Touch(witness)
    torch.save(content, file)


def poison_metadata(file: Path, witness: Path) -> None:
    """Let `.metadata` run code when it is unpickled, and give what it held."""
    metadata = pickle.loads(file.read_bytes())
    metadata.planner_data = [Touch(witness), metadata.planner_data]
    file.write_bytes(pickle.dumps(metadata))


def drop_manifest(directory: Path) -> None:
    """Let no digest tell that the file was changed: a hostile checkpoint comes with digests that fit, or without."""
    (directory / "manifest.json").unlink()


@pytest.fixture(scope="module", params=["torch", "torch_dist"])
def trained(
    request: pytest.FixtureRequest,
    server: engine.Server,
    corpus: engine.Corpus,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, list[str]]:
    """A checkpoint of a run of one iteration, and the run's flags."""
    folder = tmp_path_factory.mktemp(request.param)
    flags = {"train_iters": 1, "seq_length": 32, "micro_batch_size": 2, "global_batch_size": 2, "eval_iters": 0}
    flags |= {"ckpt_format": request.param, "save": folder / "checkpoints", "lr": 1e-3, "min_lr": 1e-4}
    words = corpus.flags(PRESETS["minimind3_tiny"], **flags)
    server.run(words, folder / "run")
    return folder / "checkpoints", list(words)


def hostile(trained: tuple[Path, list[str]], folder: Path, witness: Path) -> tuple[Path, str]:
    """A copy of the checkpoint that would run code, and the name of the file that does."""
    root = shutil.copytree(trained[0], folder / "checkpoints")
    directory = root / "iter_0000001"
    drop_manifest(directory)
    if (directory / ".metadata").is_file():
        poison_metadata(directory / ".metadata", witness)
        return root, ".metadata"
    poison_torch(directory / "mp_rank_00" / "model_optim_rng.pt", witness)
    return root, "model_optim_rng.pt"


def test_every_program_refuses_it_by_name(trained: tuple[Path, list[str]], tmp_path: Path, witness: Path) -> None:
    root, name = hostile(trained, tmp_path, witness)
    words = [word for word in trained[1] if word not in ("--save", str(trained[0]))]
    save = ["--save-dir", tmp_path / "hf"]
    runs: dict[str, list[object]] = {
        "pretrain_gpt.py": [*words, "--load", root, "--train-iters", 2, "--override-opt_param-scheduler"],
        "convert_ckpt_v2.py": [*"--load-model-type mg --save-model-type hf".split(), "--load-dir", root, *save],
        "inference.py": ["--load", root, "--prompt", "a", "--raw"],
    }
    for program, flags in runs.items():
        result = run(program, *flags)
        assert result.returncode == 1, (program, result.stdout, result.stderr)
        assert name in result.stderr and "posix.system" in result.stderr, (program, result.stderr)
        assert "Traceback" not in result.stderr, (program, result.stderr)
        assert not witness.exists(), program


def test_objects_between_the_tensors_are_looked_at(
    trained: tuple[Path, list[str]], tmp_path: Path, witness: Path
) -> None:
    """torch_dist keeps some objects as pickles of their own inside its data files."""
    from torch.distributed.checkpoint.metadata import BytesStorageMetadata

    directory = shutil.copytree(trained[0] / "iter_0000001", tmp_path / "iter_0000001")
    if not (directory / ".metadata").is_file():
        pytest.skip("the torch format has no such objects")
    metadata = pickle.loads((directory / ".metadata").read_bytes())
    index = next(
        i for i in metadata.storage_data if isinstance(metadata.state_dict_metadata[i.fqn], BytesStorageMetadata)
    )
    buffer = io.BytesIO()
    torch.save(Touch(witness), buffer)
    (directory / "hostile.distcp").write_bytes(buffer.getvalue())
    place = metadata.storage_data[index]
    place.relative_path, place.offset, place.length = "hostile.distcp", 0, len(buffer.getvalue())
    (directory / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(UserError, match=r"hostile\.distcp: names posix\.system"):
        torch_zip.check_checkpoint(directory)
    assert not witness.exists()


def test_an_intact_checkpoint_passes(trained: tuple[Path, list[str]]) -> None:
    torch_zip.check_checkpoint(trained[0] / "iter_0000001")


def test_the_plans_that_megatron_0_12_1_saves_pass(trained: tuple[Path, list[str]], tmp_path: Path) -> None:
    """MindSpeed-RL saves torch_dist with megatron-core 0.12.1, whose `.metadata` holds every rank's plan."""
    from megatron.core.dist_checkpointing.strategies.torch import MCoreSavePlan

    directory = shutil.copytree(trained[0] / "iter_0000001", tmp_path / "iter_0000001")
    if not (directory / ".metadata").is_file():
        pytest.skip("the torch format has no plans")
    metadata = pickle.loads((directory / ".metadata").read_bytes())
    metadata.all_local_plans = [MCoreSavePlan.__new__(MCoreSavePlan)]
    (directory / ".metadata").write_bytes(pickle.dumps(metadata))
    torch_zip.check_checkpoint(directory)
    found = unpickling.load_pickle(directory / ".metadata")
    assert found.state_dict_metadata.keys() == metadata.state_dict_metadata.keys()


def test_megatrons_own_objects_pass(tmp_path: Path) -> None:
    """What Megatron's training programs write beside numbers: enumerations, dtypes, arrays, paths."""
    import numpy as np
    from megatron.core.enums import ModelType
    from megatron.core.transformer.enums import AttnBackend

    args = argparse.Namespace(model_type=ModelType.encoder_or_decoder, attention_backend=AttnBackend.auto)
    args.params_dtype, args.path = torch.bfloat16, Path("a")
    states = [{"np_rng_state": np.random.get_state(), "loss": np.float64(1.5), "seen": {1, 2}}]
    torch.save({"args": args, "rng_state": states, "weight": torch.ones(2)}, tmp_path / "file.pt")
    found = torch_zip.load_torch(tmp_path / "file.pt")
    assert found["args"] == args and found["rng_state"][0]["loss"] == 1.5 and found["rng_state"][0]["seen"] == {1, 2}
    assert (found["rng_state"][0]["np_rng_state"][1] == states[0]["np_rng_state"][1]).all()  # type: ignore[index]


def test_trust_lifts_the_restriction(tmp_path: Path, witness: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save({"args": Touch(witness)}, tmp_path / "file.pt")
    with pytest.raises(UserError, match=r"posix\.system.*--trust-checkpoints"):
        torch_zip.load_torch(tmp_path / "file.pt")
    assert not witness.exists()
    monkeypatch.setenv("MINIMIND_TRUST_CHECKPOINTS", "1")
    torch_zip.load_torch(tmp_path / "file.pt")
    assert witness.exists()


@pytest.mark.parametrize("name", ["pretrain_gpt.py", "posttrain_gpt.py"])
def test_the_launcher_looks_before_mindspeed_llm_starts(
    trained: tuple[Path, list[str]], tmp_path: Path, witness: Path, name: str
) -> None:
    root, file = hostile(trained, tmp_path, witness)
    with pytest.raises(UserError, match=f"{file.removeprefix('.')}: names posix.system"):
        checkpoints.check_pickles(root)
    if file != ".metadata":  # torch_dist is refused for its format before
        flags = [*PRESETS["minimind3_tiny"].megatron_flags(), "--load", str(root), "--seq-length", "32"]
        flags += ["--attention-dropout", "0.0", "--hidden-dropout", "0.0", "--micro-batch-size", "1"]
        args = build_parser(prog=name).parse_args(flags)
        assert any("posix.system" in problem for problem in checkpoints.fit_problems(args, hosts=1))
    assert not witness.exists()


def test_an_archive_with_a_second_pickle_is_refused(tmp_path: Path) -> None:
    """torch's reader looks records up without regard to case, so that two readers could see two pickles."""
    torch.save({"a": torch.ones(1)}, tmp_path / "file.pt")
    with zipfile.ZipFile(tmp_path / "file.pt", "a") as archive:
        archive.writestr("file/DATA.PKL", b"x")
    with pytest.raises(UserError, match="several archives"):
        torch_zip.check_file(tmp_path / "file.pt")


def test_torchscript_is_refused(tmp_path: Path) -> None:
    torch.jit.script(torch.nn.Linear(1, 1)).save(str(tmp_path / "file.pt"))
    with pytest.raises(UserError, match="TorchScript"):
        torch_zip.check_file(tmp_path / "file.pt")


def test_a_hostile_pth_is_refused(tmp_path: Path, witness: Path) -> None:
    torch.save({"model.embed_tokens.weight": torch.ones(4, 4), "x": Touch(witness)}, tmp_path / "weights.pth")
    words = ["--load-model-type", "hf", "--save-model-type", "hf", "--load-dir", tmp_path / "weights.pth"]
    result = run("convert_ckpt_v2.py", *words, "--save-dir", tmp_path / "out")
    assert result.returncode == 1 and "weights.pth: names posix.system" in result.stderr
    assert not witness.exists() and not (tmp_path / "out").exists()


def test_bytes_of_no_pickle_are_one_sentence(tmp_path: Path) -> None:
    (tmp_path / ".metadata").write_bytes(json.dumps({"a": 1}).encode())
    with pytest.raises(UserError, match="not a pickle"):
        unpickling.load_pickle(tmp_path / ".metadata")
