"""Files are whole or absent, and damage is found and named."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest

from minimind_mcore import storage
from minimind_mcore.errors import UserError


def test_file_appears_when_the_block_ends(tmp_path: Path) -> None:
    target = tmp_path / "new" / "file"
    with storage.atomic_file(target) as f:
        f.write(b"whole")
        assert not target.exists()
    assert target.read_bytes() == b"whole"
    assert [p.name for p in target.parent.iterdir()] == ["file"]


def test_failed_write_leaves_what_was_there(tmp_path: Path) -> None:
    storage.atomic_write_text(tmp_path / "file", "old")
    with pytest.raises(ValueError), storage.atomic_file(tmp_path / "file") as f:
        f.write(b"half")
        raise ValueError
    assert (tmp_path / "file").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_directory_is_replaced_whole(tmp_path: Path) -> None:
    for content in ("old", "new"):
        with storage.atomic_directory(tmp_path / "d") as tmp:
            (tmp / content).write_text(content)
    assert [p.name for p in (tmp_path / "d").iterdir()] == ["new"]
    with pytest.raises(ValueError), storage.atomic_directory(tmp_path / "d") as tmp:
        (tmp / "half").write_text("")
        raise ValueError
    assert [p.name for p in tmp_path.rglob("*")] == ["d", "new"]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_full_disk_names_the_file_and_what_to_do(tmp_path: Path, code: int) -> None:
    message = rf"disk full while writing {tmp_path}/a/b: .* Free some space"
    with pytest.raises(UserError, match=message), storage.disk_errors(tmp_path / "a" / "b"):
        raise OSError(code, "no space")


def test_full_disk_is_recognised_behind_another_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        with storage.disk_errors(tmp_path / "file"):
            raise RuntimeError("unexpected pos 704 vs 598")

    with pytest.raises(RuntimeError):
        fail()
    usage: Any = type("usage", (), {"free": 4096})
    monkeypatch.setattr(storage.shutil, "disk_usage", lambda where: usage)
    with pytest.raises(UserError, match="disk full"):
        fail()


def test_other_errors_pass_unchanged(tmp_path: Path) -> None:
    with pytest.raises(PermissionError), storage.disk_errors(tmp_path):
        raise PermissionError(errno.EACCES, "no")
    with pytest.raises(UserError, match="mine"), storage.disk_errors(tmp_path):
        raise UserError("mine")


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """Two files and their manifest."""
    for name in ("a", "sub/b"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("content of " + name)
    entries = {name: storage.file_entry(tmp_path / name) for name in ("a", "sub/b")}
    storage.write_manifest(tmp_path, entries)
    return tmp_path


def test_whole_directory_agrees_with_its_manifest(directory: Path) -> None:
    assert storage.check_manifest(directory) == []


def test_damage_is_named(directory: Path) -> None:
    (directory / "a").write_text("content of A")
    assert storage.check_manifest(directory) == [
        f"{directory / 'a'}: content differs from its SHA-256 in manifest.json"
    ]
    (directory / "a").write_text("content")
    assert storage.check_manifest(directory) == [f"{directory / 'a'}: 7 bytes, expected 12"]
    (directory / "sub/b").unlink()
    assert storage.check_manifest(directory)[1] == f"{directory / 'sub/b'}: missing, but listed in manifest.json"
    shares = [storage.check_manifest(directory, share, 2) for share in range(2)]
    assert sorted(shares[0] + shares[1]) == sorted(storage.check_manifest(directory))
    (directory / "manifest.json").write_text("{")
    assert storage.check_manifest(directory) == [f"{directory / 'manifest.json'}: not a readable manifest"]
