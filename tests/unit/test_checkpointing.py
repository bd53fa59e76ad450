"""Which checkpoints are kept, and which is loaded."""

from __future__ import annotations

from pathlib import Path

from minimind_mcore.checkpoint.choose import check
from minimind_mcore.storage import file_entry, write_manifest
from minimind_mcore.training import checkpointing as ck


def make(root: Path, iteration: int) -> Path:
    """A whole checkpoint of one small file."""
    directory = ck.directory_of(root, iteration)
    directory.mkdir(parents=True)
    (directory / "weights.pt").write_bytes(b"w" * iteration)
    write_manifest(directory, {"weights.pt": file_entry(directory / "weights.pt")})
    return directory


def save(root: Path, iteration: int, keep_last: int) -> None:
    tmp = make(root / "tmp", iteration)
    entries = [{"weights.pt": file_entry(tmp / "weights.pt")}]
    ck._publish(root, tmp, ck.directory_of(root, iteration), entries, iteration, keep_last)


def test_keeping_the_last_never_removes_the_one_just_written(tmp_path: Path) -> None:
    make(tmp_path, 200)
    make(tmp_path, 300)  # the run went back behind it
    save(tmp_path, 250, keep_last=1)
    assert ck.iterations_in(tmp_path) == [300, 250]
    assert (tmp_path / ck.TRACKER).read_text() == "250"
    assert ck.choose(tmp_path) == ck.directory_of(tmp_path, 250)


def test_every_file_is_checked_without_process_groups(tmp_path: Path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setenv("WORLD_SIZE", "4")
    directory = make(tmp_path, 100)
    (directory / "weights.pt").unlink()
    assert check(directory)
