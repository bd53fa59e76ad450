"""Write the signatures of torch_npu's operators, to which the stand-in holds its callers.

    pip download --no-deps torch_npu==2.7.1 && python rehearsal/schemas.py torch_npu-2.7.1-*.whl

The wheel's library contains the signature of each operator as text. The signatures of the operators that the stand-in
has are written to `schemas_VERSION.txt` next to its code.
"""

from __future__ import annotations

import hashlib
import re
import sys
import zipfile
from pathlib import Path

STAND_IN = Path(__file__).parent / "minimind_mcore_rehearsal/python/torch_npu"
LIBRARY = "torch_npu/lib/libtorch_npu.so"
SIGNATURE = re.compile(rb"([a-z][a-z0-9_]*)(\.[A-Za-z_]+)?\([ -'*-~()]*\) -> [ -~]+")


def names() -> set[str]:
    """Return the names of `ops.__all__`, without importing the stand-in."""
    text = (STAND_IN / "ops/__init__.py").read_text(encoding="utf-8")
    return set(re.findall(r'"(\w+)"', text[text.index("__all__ = [") :].split("]")[0]))


def main() -> None:
    """Write the file of the wheel that the argument names."""
    wheel = Path(sys.argv[1])
    version = wheel.name.split("-")[1]
    with zipfile.ZipFile(wheel) as archive:
        found = {match[0].decode() for match in SIGNATURE.finditer(archive.read(LIBRARY))}
    wanted = names()
    lines = sorted(line for line in found if re.split(r"[.(]", line)[0] in wanted)
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    target = STAND_IN / f"schemas_{version}.txt"
    target.write_text("\n".join([f"# {wheel.name} sha256 {digest}", *lines, ""]), encoding="utf-8")
    missing = wanted - {re.split(r"[.(]", line)[0] for line in lines}
    print(f"{target}: {len(lines)} signatures; not in this wheel: {', '.join(sorted(missing)) or 'none'}")


if __name__ == "__main__":
    main()
