"""The folders at the top are subpackages of minimind_mcore through links, in every way that the kit is distributed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from helpers.engine import ROOT

IMPORT = """
import minimind_mcore
from minimind_mcore import converters
from minimind_mcore.models import config
from minimind_mcore.preprocess import templates
assert templates.read_templates(None)  # a data file of a linked folder
print(*minimind_mcore.__path__, converters.__file__, config.__file__, templates.__file__)
"""
PACKED = "minimind_mcore/configs"
LINKED = ("converters", "models", "preprocess")
BUILD = "import sys; from setuptools import build_meta; print(getattr(build_meta, sys.argv[1])(sys.argv[2]))"


def run(folder: Path, *words: str, path: Path | None = None) -> str:
    """What a new interpreter prints in a directory, with another one first on its path."""
    environ = {**os.environ, "PYTHONPATH": str(path or "")}
    done = subprocess.run([sys.executable, *words], cwd=folder, env=environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def assert_imports(folder: Path) -> None:
    """All four packages come from this directory."""
    files = run(Path("/"), "-c", IMPORT, path=folder).split()
    assert len(files) == 4 and all(file.startswith(f"{folder}/minimind_mcore") for file in files), files


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tracked files, as `git archive` gives them, else as they are here."""
    folder = tmp_path_factory.mktemp("checkout") / "kit"
    folder.mkdir()
    archived = subprocess.run(["git", "archive", "HEAD", "-o", folder.parent / "kit.tar"], cwd=ROOT)
    if archived.returncode == 0:
        with tarfile.open(folder.parent / "kit.tar") as archive:
            archive.extractall(folder, filter="data")
    else:
        left_behind = shutil.ignore_patterns(".*", "data", "outputs", "build", "*.egg-info", "__pycache__")
        shutil.copytree(ROOT, folder, symlinks=True, ignore=left_behind, dirs_exist_ok=True)
    return folder


def built(source: Path, kind: str, out: Path) -> Path:
    """The file that setuptools builds."""
    pytest.importorskip("setuptools")
    return out / run(source, "-c", BUILD, f"build_{kind}", str(out)).split()[-1]


def unpacked(wheel: Path, out: Path) -> Path:
    """The directory with the files of a wheel."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(out)
    return out


@pytest.fixture(scope="module")
def wheel(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory that the wheel of the checkout makes in site-packages."""
    folder = tmp_path_factory.mktemp("wheel")
    return unpacked(built(checkout, "wheel", folder), folder / "site")


def test_a_checkout_that_is_not_installed(checkout: Path) -> None:
    assert_imports(checkout)


def test_the_wheel_of_a_checkout(checkout: Path, wheel: Path) -> None:
    assert_imports(wheel)
    modules = {file.relative_to(checkout) for file in (checkout / "minimind_mcore").rglob("*.py")}
    for name in LINKED:
        modules |= {Path("minimind_mcore") / file.relative_to(checkout) for file in (checkout / name).rglob("*.py")}
    assert {file for file in modules if not (wheel / file).is_file()} == set()
    assert sorted(path.name for path in wheel.iterdir() if path.suffix != ".dist-info") == ["minimind_mcore"]


def test_the_wheel_of_the_source_distribution(checkout: Path, wheel: Path, tmp_path: Path) -> None:
    """It has the files of the linked folders in place of the links."""
    with tarfile.open(built(checkout, "sdist", tmp_path)) as archive:
        archive.extractall(tmp_path, filter="data")
    [source] = (path for path in tmp_path.iterdir() if path.is_dir())
    assert_imports(source)
    site = unpacked(built(source, "wheel", tmp_path), tmp_path / "site")
    names = [{str(path.relative_to(folder)) for path in folder.rglob("*")} for folder in (site, wheel)]
    compiled = {name for name in names[1] if "__pycache__" in name}  # other tests have imported from this wheel
    assert names[0] == names[1] - compiled


def test_an_editable_installation(checkout: Path, tmp_path: Path) -> None:
    """pip unpacks the wheel into site-packages, where the interpreter reads its .pth file."""
    site = unpacked(built(checkout, "editable", tmp_path), tmp_path / "site")
    forget = """import site, sys
sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in finder.__module__]
for name in [name for name in sys.modules if "editable" in name]:
    del sys.modules[name]
"""  # the installation of this checkout
    files = run(Path("/"), "-c", f"{forget}site.addsitedir({str(site)!r}){IMPORT}", path=site).split()
    assert {Path(file).resolve().relative_to(checkout).parts[0] for file in files} == {
        "minimind_mcore", "converters", "models", "preprocess",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        ("--help", "usage: minimind-mcore COMMAND"),
        ("doctor", "ok    torch"),
        ("rl show --config-name grpo_minimind_tiny", "algorithm: grpo"),
        ("rl lint grpo_minimind_tiny", "configs/rlxf/grpo_minimind_tiny.yaml: fit for embedded"),
        ("rl lint dapo_minimind3 --target mindspeed-rl-master --output new.yaml", "fit for mindspeed-rl-master"),
        # The weights to export are the user's: the configuration has been found and composed by then.
        ("rl export-verl grpo_minimind_tiny --output verl", "actor_config.load: outputs/minimind3_tiny/math_sft"),
    ],
)
def test_every_command_works_in_an_empty_directory(words: str, shown: str, wheel: Path, tmp_path: Path) -> None:
    environ = os.environ | {"PYTHONPATH": str(wheel), "DEVICE": "cpu"}
    command = [sys.executable, "-m", "minimind_mcore.cli", *words.split()]
    done = subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True)
    assert shown in done.stdout + done.stderr
    assert done.returncode == ("export-verl" in words), done.stderr


HELP = """
import sys
from minimind_mcore.cli import COMMANDS, main
for name in COMMANDS:
    sys.argv = ["minimind-mcore", name, "--help"]
    try:
        main()
    except SystemExit as end:
        print(name, end.code or 0, file=sys.stderr)
"""


def test_every_command_has_help_in_an_empty_directory(wheel: Path, tmp_path: Path) -> None:
    environ = os.environ | {"PYTHONPATH": str(wheel), "DEVICE": "cpu"}
    done = subprocess.run([sys.executable, "-c", HELP], cwd=tmp_path, env=environ, capture_output=True, text=True)
    from minimind_mcore.cli import COMMANDS

    assert [line for line in done.stderr.splitlines() if line.split()[0] in COMMANDS] == [f"{n} 0" for n in COMMANDS]
    assert not list(tmp_path.iterdir())


def test_every_configuration_is_installed(wheel: Path) -> None:
    names = [{path.relative_to(top) for path in top.rglob("*.*")} for top in (ROOT / "configs", wheel / PACKED)]
    assert names[0] == names[1] and len(names[0]) > 30


def test_the_web_pages_are_installed(wheel: Path) -> None:
    folders = (ROOT / "minimind_mcore/web", wheel / "minimind_mcore/web")
    names = [{path.name for path in folder.glob("*.*")} for folder in folders]
    assert names[0] == names[1] and {"chat.html", "chat.js", "chat.css", "licenses.txt"} < names[0]


def test_the_stand_in_is_a_package_of_its_own(checkout: Path, wheel: Path, tmp_path: Path) -> None:
    assert not [path for path in wheel.rglob("*") if "torch_npu" in path.name or "rehearsal" in path.parts]
    site = unpacked(built(checkout / "rehearsal", "wheel", tmp_path), tmp_path / "site")
    folder = Path(run(Path("/"), "-m", "minimind_mcore_rehearsal", path=site).strip())
    assert folder == site / "minimind_mcore_rehearsal/python"
    here = ROOT / "rehearsal/minimind_mcore_rehearsal/python"
    files = [
        {path.relative_to(top) for path in top.rglob("*") if path.is_file() and path.suffix != ".pyc"}
        for top in (here, folder)
    ]
    assert files[0] == files[1] and Path("torch_npu-2.7.1.dist-info/entry_points.txt") in files[1]


@pytest.mark.parametrize("name", LINKED)
def test_the_name_at_the_top_is_refused(name: str) -> None:
    """`import models.config` would make a second ModelConfig."""
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r})\ntry: import {name}\nexcept ImportError as e: print(e)"
    assert f"import minimind_mcore.{name} instead of {name}" in run(Path("/"), "-c", code)
