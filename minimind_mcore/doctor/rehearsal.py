"""REHEARSE=1: check what a rehearsal on this CPU needs instead of an NPU (see requirements/rehearse.sh)."""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from minimind_mcore.doctor import matrix
from minimind_mcore.doctor.finding import Finding, fail, ok, warn
from minimind_mcore.doctor.installed import Host, core_beside, fingerprint
from minimind_mcore.paths import CHECKOUT

ENVIRONMENT = CHECKOUT / ".venv-rehearsal"
WHAT = {"mindspeed-llm": "MindSpeed-LLM's own programs", "native": "the kit's own engine with MindSpeed's patches"}


@dataclass(frozen=True)
class Upstream:
    """An upstream source: name, variable with its directory, a file that it contains, and the rehearsed release."""

    name: str
    file: str
    release: str

    @property
    def variable(self) -> str:
        """The variable with its directory, such as MINDSPEED_LLM_HOME."""
        return "MEGATRON_HOME" if self.name == "Megatron-LM" else self.name.upper().replace("-", "_") + "_HOME"

    def version(self, place: Path) -> str:
        """Return the release in a folder."""
        if self.name == "Megatron-LM":
            return core_beside(place).version or "unknown"
        return fingerprint(self.name, place)

    def check(self, host: Host, place: Path) -> Finding:
        """Check that a folder has the source in the rehearsed release."""
        pin = matrix.data()["pins"][self.name]
        clone = f"git clone -b {pin['ref']} {pin['url']}"
        if not (place / self.file).is_file():
            given = f"{self.variable}={host.environ.get(self.variable) or 'unset'}"
            return fail(self.name, f"{given}: no {self.file} in {place}", f"{clone} {place}")
        version = self.version(place)
        if version != self.release:
            other = f"{self.name}-{self.release}"
            text = f"{version} at {place}; rehearsed was {self.release}"
            return warn(self.name, text, f"{clone} {other} && export {self.variable}=$PWD/{other}")
        return ok(self.name, f"{version} at {place}")


LLM = Upstream("MindSpeed-LLM", "pretrain_gpt.py", "26.1.0")
BESIDE = (
    Upstream("MindSpeed", "mindspeed/megatron_adaptor.py", "26.1.0"),
    Upstream("Megatron-LM", "megatron/core/package_info.py", "0.12.1"),
)


def asked(host: Host) -> bool:
    """Return whether the scripts would rehearse."""
    return (host.environ.get("REHEARSE") or "0") != "0"


def check(host: Host, backend: str) -> list[Finding]:
    """Report what would be rehearsed, and check whether it can be."""
    processes = host.environ.get("NPUS_PER_NODE") or "2"
    text = (
        f"{WHAT[backend]} on this CPU, in {processes} processes, with a stand-in for torch_npu. It finds wrong flags, "
        "files, layers and numbers; of speed, memory, HCCL and CANN's operators it says nothing"
    )
    found = [ok("rehearsal", text)]
    llm = _llm(host)
    found.append(LLM.check(host, llm))
    for source in BESIDE:
        given = host.environ.get(source.variable)
        found.append(source.check(host, Path(given) if given else llm.parent / source.name))
    if not any(host.run(compiler, "--version") for compiler in ("c++", "g++")):
        fix = "apt install g++    # or yum install gcc-c++"
        found.append(fail("compiler", "no c++ or g++ here; Megatron-LM compiles a helper with it", fix))
    return [*found, _environment(host)]


def _llm(host: Host) -> Path:
    """Return MindSpeed-LLM's folder, or the place where it is expected."""
    if given := host.environ.get(LLM.variable):
        return Path(given)
    places = [host.root / "workspace" / LLM.name]
    if host.root == Path("/"):
        places.insert(0, CHECKOUT.parent / LLM.name)
    return next((place for place in places if (place / LLM.file).is_file()), places[0])


def is_made() -> bool:
    """Return whether the rehearsal environment exists. A script's dry run would create it."""
    return (ENVIRONMENT / "installed").is_file()


def _environment(host: Host) -> Finding:
    """Check the rehearsal environment that the scripts create, possibly with another Python than the kit's."""
    if is_made():
        return ok("environment", str(ENVIRONMENT))
    python = host.environ.get("PYTHON") or "python3"
    printed = host.run(python, "--version") or ""
    version = re.search(r"3\.(\d+)", printed)
    if not version or not 10 <= int(version[1]) < 13:
        text = f"{python} is {printed.strip() or 'not there'}; expected Python 3.10 to 3.12, as numpy 1.26 does"
        return fail("environment", text, "export PYTHON=python3.11    # or another of these")
    free = shutil.disk_usage(CHECKOUT).free / 2**30
    text = f"{ENVIRONMENT} is not made yet: the first rehearsal downloads its 2 GB ({free:.0f} GiB free)"
    return (warn if free > 3 else fail)("environment", text, "bash requirements/rehearse.sh")
