"""A damaged manifest, tracker or archive costs no finished checkpoint, and no damage is trained on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.engine import ROOT, Corpus, Run, Server

from minimind_mcore.models.presets import PRESETS

CONFIG = PRESETS["minimind2_small_tiny"]
TRACKER = "latest_checkpointed_iteration.txt"


@pytest.fixture(scope="module", params=["torch", "torch_dist"])
def saved(
    request: pytest.FixtureRequest, server: Server, corpus: Corpus, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Checkpoints of the iterations 2 and 4."""
    folder = tmp_path_factory.mktemp(f"saved_{request.param}")
    flags = {"train_iters": 4, "save": folder / "saved", "save_interval": 2, "ckpt_format": request.param}
    server.run(corpus.flags(CONFIG, **flags), folder / "run")
    return folder / "saved"


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    """A copy of the checkpoints that a test may damage."""
    for file in (file for file in saved.rglob("*") if file.is_file()):
        target = tmp_path / "saved" / file.relative_to(saved)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(file.read_bytes())
    return tmp_path / "saved"


def go_on(server: Server, corpus: Corpus, saved: Path) -> Run:
    """Load the checkpoints, and train to iteration 5."""
    argv = corpus.flags(CONFIG, train_iters=5, load=saved)
    return server.run([*argv, "--override-opt_param-scheduler"], saved.parent / "second", check=False)


# Damages of the newest checkpoint, and what the run says.


def flip(file: Path, at: int) -> None:
    content = bytearray(file.read_bytes())
    content[at] ^= 1
    file.write_bytes(bytes(content))


def entries_are_no_dictionary(directory: Path) -> str:
    (directory / "manifest.json").write_text('{"files": 3}')
    return "manifest.json: not a readable manifest"


def a_key_is_another(directory: Path) -> str:
    file = directory / "manifest.json"
    flip(file, file.read_bytes().index(b'"bytes"') + 1)
    return "manifest.json: not a readable manifest"


def not_utf8(directory: Path) -> str:
    file = directory / "manifest.json"
    file.write_bytes(file.read_bytes().replace(b"sha256", b"sha\xff56", 1))
    return "manifest.json: not a readable manifest"


def no_manifest_and_a_flipped_byte(directory: Path) -> str:
    """One byte of the largest record of a file, which torch.load does not compare with its checksum."""
    (directory / "manifest.json").unlink()
    file = max((p for p in directory.rglob("*") if p.suffix in (".pt", ".distcp")), key=lambda p: p.stat().st_size)
    flip(file, file.stat().st_size // 2)
    return f"{file.name}: record "


@pytest.mark.parametrize(
    "damage", [entries_are_no_dictionary, a_key_is_another, not_utf8, no_manifest_and_a_flipped_byte]
)
def test_damage_leads_to_the_checkpoint_before(
    server: Server, corpus: Corpus, copy: Path, damage: Callable[[Path], str]
) -> None:
    message = damage(copy / "iter_0000004")
    run = go_on(server, corpus, copy)
    assert run.codes == [0] and message in run.output and "Traceback" not in run.output, run.output
    assert "iter_0000004 is damaged; trying another one" in run.output
    assert "iteration 2, 16 samples consumed" in run.output


def test_whole_checkpoints_without_a_manifest_load(server: Server, corpus: Corpus, copy: Path) -> None:
    (copy / "iter_0000004" / "manifest.json").unlink()
    run = go_on(server, corpus, copy)
    assert run.codes == [0] and "iteration 4, 32 samples consumed" in run.output, run.output


@pytest.mark.parametrize("content", [b"4\xff", "\u00b2".encode(), b"9" * 5000], ids=["bytes", "superscript", "long"])
def test_a_damaged_tracker_leads_to_the_newest_checkpoint(
    server: Server, corpus: Corpus, copy: Path, content: bytes
) -> None:
    (copy / TRACKER).write_bytes(content)
    run = go_on(server, corpus, copy)
    assert run.codes == [0] and "Traceback" not in run.output, run.output
    assert f"{TRACKER}: found" in run.output and "iteration 4, 32 samples consumed" in run.output


def test_a_damaged_tracker_is_named_by_the_converters(copy: Path) -> None:
    from minimind_mcore.checkpoint.opening import open_source
    from minimind_mcore.errors import UserError

    (copy / TRACKER).write_bytes(b"\xff4")
    with pytest.raises(UserError, match=TRACKER):
        open_source(copy)


def test_every_flipped_byte_of_a_manifest_is_survived(tmp_path: Path) -> None:
    from minimind_mcore.storage import check_manifest, file_entry, write_manifest

    (tmp_path / "weights.pt").write_bytes(b"weights")
    write_manifest(tmp_path, {"weights.pt": file_entry(tmp_path / "weights.pt")})
    file = tmp_path / "manifest.json"
    content = file.read_bytes()
    for at in range(len(content)):
        for bit in range(8):
            changed = bytearray(content)
            changed[at] ^= 1 << bit
            file.write_bytes(bytes(changed))
            try:
                same = json.loads(bytes(changed)) == json.loads(content)
            except ValueError:
                same = False
            assert same or check_manifest(tmp_path), bytes(changed)


def test_a_manifest_that_lists_nothing_is_damaged(tmp_path: Path) -> None:
    from minimind_mcore.storage import check_manifest

    (tmp_path / "manifest.json").write_text('{"files": {}}')
    assert check_manifest(tmp_path) == [f"{tmp_path / 'manifest.json'}: not a readable manifest"]


def test_records_are_compared_with_their_checksums(tmp_path: Path) -> None:
    import torch

    from minimind_mcore.checkpoint.torch_zip import check_records

    file = tmp_path / "weights.pt"
    torch.save({"a": torch.arange(1000), "b": torch.ones(7)}, file)
    assert check_records(file) == []
    with zipfile.ZipFile(file) as archive:
        info = next(info for info in archive.infolist() if info.filename.endswith("data/0"))
    flip(file, info.header_offset + 400)
    assert check_records(file) == [f"{file}: record {info.filename} differs from its CRC-32"]
    # what torch wrote without checksums cannot be compared
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"a": torch.arange(1000)}, file)
    finally:
        torch.serialization.set_crc32_options(before)
    assert check_records(file) == []
    file.write_bytes(file.read_bytes()[:-30])
    assert "truncated" in check_records(file)[0]


@pytest.mark.parametrize("number", [-1, 0])
def test_keeping_less_than_one_checkpoint_is_refused(
    server: Server, corpus: Corpus, tmp_path: Path, number: int
) -> None:
    flags = {"train_iters": 2, "save": tmp_path / "saved", "save_interval": 1, "ckpt_format": "torch"}
    server.run(corpus.flags(CONFIG, **flags), tmp_path / "first")
    before = sorted(str(path) for path in (tmp_path / "saved").rglob("*"))
    flags |= {"train_iters": 4, "load": tmp_path / "saved", "keep_last": number}
    run = server.run(corpus.flags(CONFIG, **flags), tmp_path / "second", check=False)
    assert run.codes == [1] and f"--keep-last: found {number}, expected 1 or more" in run.output, run.output
    assert sorted(str(path) for path in (tmp_path / "saved").rglob("*")) == before


def test_keeping_less_than_one_checkpoint_is_refused_by_the_script(tmp_path: Path) -> None:
    environment = os.environ | {
        "PYTHON": sys.executable,
        "DEVICE": "cpu",
        "NPUS_PER_NODE": "1",
        "DATA_DIR": str(tmp_path),
    }
    environment |= {"OUTPUT_DIR": str(tmp_path / "out")}
    script = ROOT / "examples/mcore/minimind/pretrain_minimind_ptd.sh"
    command = ["bash", str(script), "--keep-last", "-1", "--dry-run"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 1 and "--keep-last: found -1, expected 1 or more" in done.stderr, done.stderr


def test_keeping_less_than_one_checkpoint_is_refused_in_yaml() -> None:
    from minimind_mcore.rl.config.lint import lint

    findings, _, _ = lint("grpo_minimind3", "embedded", ["minimind.keep_last=-1"], device="cpu")
    assert any("minimind.keep_last" in str(finding) and "expected 1" in str(finding) for finding in findings)
