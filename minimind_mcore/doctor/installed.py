"""Find what is installed from files and metadata. Nothing is imported, because an import may fail."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from minimind_mcore.doctor import matrix
from minimind_mcore.paths import CHECKOUT

# Components in the table's order. The version of a Python package is in the metadata of its distribution.
DISTRIBUTIONS = (
    "torch", "torch_npu", "megatron-core", "transformers", "numpy", "vLLM", "vllm-ascend", "Triton-Ascend", "ray",
)  # fmt: skip
COMPONENTS = (
    "driver", "CANN", "Python", "torch", "torch_npu", "MindSpeed", "MindSpeed-LLM", "MindSpeed-RL",
    "megatron-core", "transformers", "numpy", "vLLM", "vllm-ascend", "Triton-Ascend", "ray",
)  # fmt: skip


INFO = "ascend_toolkit_install.info"


@dataclass(frozen=True)
class Host:
    """The host to examine. Tests use other directories.

    Attributes:
        root: root of the file system with /dev, /proc, /usr/local/Ascend.
        environ: the environment.
        path: directories of Python packages. None: those of this interpreter.
        python: interpreter of the job.
    """

    root: Path = Path("/")
    environ: Mapping[str, str] = field(default_factory=lambda: os.environ)
    path: tuple[str, ...] | None = None
    python: str = sys.executable

    def run(self, *command: str, timeout: float = 60) -> str | None:
        """Return the output of a program on the PATH. None if it does not exist or fails."""
        program = shutil.which(command[0], path=self.environ.get("PATH", ""))
        if program is None:
            return None
        try:
            done = subprocess.run(
                [program, *command[1:]], env=dict(self.environ), capture_output=True, text=True, timeout=timeout
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout if done.returncode == 0 else None

    def directories(self, variable: str, *defaults: str) -> list[Path]:
        """Return the directories of a variable, then the default ones."""
        given = self.environ.get(variable)
        return ([Path(given)] if given else []) + [self.root / default.lstrip("/") for default in defaults]


@dataclass(frozen=True)
class Component:
    """An installed program or package.

    Attributes:
        version: None if not installed, "unknown" if the version cannot be determined.
        where: file or directory where it was found.
    """

    name: str
    version: str | None
    where: str = ""


def examine(host: Host, backend: str) -> dict[str, Component]:
    """Return every component by name, in the table's order.

    Args:
        host: the host to examine.
        backend: with "mindspeed-llm", megatron-core is the copy in MindSpeed-LLM's folder.
    """
    found = {"driver": driver(host), "CANN": cann(host), "Python": Component("Python", platform.python_version())}
    found |= {name: distribution(host, name) for name in DISTRIBUTIONS}
    found |= {name: mindspeed(host, name) for name in ("MindSpeed", "MindSpeed-LLM", "MindSpeed-RL")}
    folder = found["MindSpeed-LLM"].where
    if backend == "mindspeed-llm" and folder:
        found["megatron-core"] = core_beside(Path(folder))
    return {name: found[name] for name in COMPONENTS}


def driver(host: Host) -> Component:
    """Return the NPU's driver from npu-smi or its version file, else NVIDIA's."""
    printed = host.run("npu-smi", "info")
    if printed and (version := re.search(r"Version:\s*(\S+)", printed)):
        return Component("driver", version[1], "npu-smi")
    for place in host.directories("ASCEND_DRIVER_PATH", "/usr/local/Ascend/driver"):
        if written := _search(place / "version.info", r"^Version=(\S+)"):
            return Component("driver", written, str(place / "version.info"))
    printed = host.run("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    if printed and printed.strip():
        return Component("driver", printed.split()[0], "nvidia-smi")
    return Component("driver", None)


def cann(host: Host) -> Component:
    """Return CANN's toolkit from the environment, else from its default directory."""
    usual = ("/usr/local/Ascend/cann", "/usr/local/Ascend/ascend-toolkit/latest")
    home = host.environ.get("HOME", "")
    directories = host.directories("CANN_HOME") + host.directories("ASCEND_TOOLKIT_HOME")
    directories += host.directories("ASCEND_HOME_PATH", *usual)
    if home:
        directories += [Path(home, "Ascend/cann"), Path(home, "Ascend/ascend-toolkit/latest")]
    for place in directories:
        # CANN_HOME contains set_env.sh. Before CANN 8.5 that was the parent directory.
        for info in (info for form in ("", "latest/") for info in sorted(place.glob(f"{form}*-linux/{INFO}"))):
            if version := _search(info, r"^version=(\S+)"):
                return Component("CANN", version.removeprefix("V"), str(place))
    return Component("CANN", None)


def distribution(host: Host, name: str) -> Component:
    """Return a Python package, from its metadata."""
    options: Any = {} if host.path is None else {"path": list(host.path)}
    for found in importlib.metadata.distributions(name=name, **options):
        return Component(name, found.version.partition("+")[0], str(found.locate_file("")))
    return Component(name, None)


def mindspeed(host: Host, name: str) -> Component:
    """Return one of MindSpeed's packages, identified by its files, because the metadata are the same in every
    release."""
    package = name.lower().replace("-", "_")
    for place in _mindspeed_directories(host, name):
        if (place / package / "__init__.py").is_file() or (place / package).is_dir():
            return Component(name, fingerprint(name, place), str(place))
    return Component(name, None)


def _mindspeed_directories(host: Host, name: str) -> list[Path]:
    variable = name.upper().replace("-", "_") + "_HOME"
    if name != "MindSpeed" and host.environ.get(variable):
        return [Path(host.environ[variable])]  # a given directory is the only candidate, as in the scripts
    given = host.directories(variable)
    beside = [CHECKOUT.parent / name] if host.root == Path("/") else []
    imported = sys.path if host.path is None else host.path
    paths = [Path(entry or ".") for entry in imported]
    return [*given, *beside, host.root / "workspace" / name, *paths, *_editable(host, name)]


def _editable(host: Host, name: str) -> list[Path]:
    """Return the source directories of `pip install -e`."""
    options: Any = {} if host.path is None else {"path": list(host.path)}
    for found in importlib.metadata.distributions(name=name.lower().replace("-", "_"), **options):
        text = found.read_text("direct_url.json") or ""
        if url := re.search(r'"url":\s*"file://([^"]+)"', text):
            return [Path(url[1])]
    return []


def fingerprint(name: str, place: Path) -> str:
    """Identify the release of one of MindSpeed's packages by a file that differs in each release."""
    for mark in matrix.data()["fingerprints"][name]:
        file = place / mark["file"]
        if file.is_file() and git_blob(file) == mark["blob"]:
            return str(mark["version"])
    return "unknown"


def git_blob(file: Path) -> str:
    """Return the output of `git hash-object` for a file."""
    content = file.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


def core_beside(folder: Path) -> Component:
    """Return megatron-core in MindSpeed-LLM's folder, where its guide copies it."""
    info = folder / "megatron" / "core" / "package_info.py"
    numbers = [_search(info, rf"^{part}\s*=\s*(\d+)") for part in ("MAJOR", "MINOR", "PATCH")]
    if None in numbers:
        return Component("megatron-core", None, str(folder))
    return Component("megatron-core", ".".join(map(str, numbers)), str(folder / "megatron"))


def _search(file: Path, pattern: str) -> str | None:
    try:
        found = re.search(pattern, file.read_text(encoding="utf-8", errors="replace"), re.M)
    except OSError:
        return None
    return found[1] if found else None
