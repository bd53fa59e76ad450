"""Unpack the wheels that benchmarks/gpu_wheels.sh collected, as far as their packages are missing here.

A wheel is a zip archive whose files belong on the path as they are. No installer and no network is needed.
"""

from __future__ import annotations

import importlib.metadata
import re
import zipfile
from pathlib import Path


def unpack_missing(folder: Path, target: Path) -> list[str]:
    """Unpack every wheel of `folder` whose distribution is not installed into `target`; returns their names."""
    unpacked = []
    for wheel in sorted(folder.glob("*.whl")):
        name, version, *_ = wheel.name.split("-")
        if _installed(name) is None:
            unpack(wheel, target)
            unpacked.append(f"{name} {version}")
    return unpacked


def unpack(wheel: Path, target: Path) -> None:
    """Unpack one wheel. What a wheel keeps in NAME.data/purelib or platlib belongs at the top; scripts are left out."""
    with zipfile.ZipFile(wheel) as archive:
        for member in archive.infolist():
            path = Path(member.filename)
            if ".." in path.parts or path.is_absolute():
                raise ValueError(f"{wheel}: found the path {member.filename}, expected one inside the wheel")
            if path.parts[0].endswith(".data"):
                if len(path.parts) < 3 or path.parts[1] not in ("purelib", "platlib"):
                    continue
                path = Path(*path.parts[2:])
            if member.is_dir():
                continue
            file = target / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(archive.read(member))


def _installed(name: str) -> str | None:
    try:
        return importlib.metadata.version(re.sub(r"[-_.]+", "-", name))
    except importlib.metadata.PackageNotFoundError:
        return None
