"""Unpack the wheels that benchmarks/gpu_wheels.sh collected, if their packages are not installed.

    python -m gpu_check.wheels --wheels .gpu_wheels --site DIRECTORY --newer DIRECTORY

A wheel is a zip archive whose files belong on the path as they are. No installer and no network is needed.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import re
import zipfile
from pathlib import Path

from gpu_check.rows import emit


def unpack_missing(folder: Path, target: Path) -> list[str]:
    """Unpack every wheel of `folder` whose distribution is not installed into `target`. Return their names."""
    return [unpack(wheel, target) for wheel in sorted(folder.glob("*.whl")) if not _installed(wheel.name.split("-")[0])]


def unpack(wheel: Path, target: Path) -> str:
    """Unpack one wheel and return its name and version.

    What a wheel keeps in NAME.data/purelib or platlib belongs at the top; scripts are left out.
    """
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
    return " ".join(wheel.name.split("-")[:2])


def _installed(name: str) -> str | None:
    try:
        return importlib.metadata.version(re.sub(r"[-_.]+", "-", name))
    except importlib.metadata.PackageNotFoundError:
        return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for flag in ("--wheels", "--site", "--newer"):
        parser.add_argument(flag, type=Path, required=True)
    args = parser.parse_args()
    emit("unpacked wheels", ", ".join(unpack_missing(args.wheels, args.site)) or "none")
    newer = [unpack(wheel, args.newer) for wheel in sorted(args.wheels.glob("newer/*.whl"))]
    emit("unpacked wheels, newer", ", ".join(newer) or "none")


if __name__ == "__main__":
    main()
