"""The doctor names what is wrong on a host, and the command that fixes it; installations here are faked with files."""

from __future__ import annotations

import argparse
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from minimind_mcore import hosts
from minimind_mcore.doctor import devices, dry_run, host, installed, main, matrix, rehearsal
from minimind_mcore.doctor.installed import Host
from minimind_mcore.errors import UserError

HEALTHY = {"torch": "2.7.1+cpu", "torch_npu": "2.7.1.post8", "transformers": "5.2.0", "numpy": "1.26.0"}
IS_FREE_PORT = host.is_free_port
DISK = shutil.disk_usage("/")._replace(total=100 << 30, free=50 << 30)
NPU_SMI = """\
+------------------------------------------------------------------------------------------------+
| npu-smi 25.5.0                   Version: 25.5.0                                               |
+---------------------------+---------------+----------------------------------------------------+
| NPU   Name                | Health        | Power(W)    Temp(C)           Hugepages-Usage(page)|
| Chip                      | Bus-Id        | AICore(%)   Memory-Usage(MB)  HBM-Usage(MB)        |
+===========================+===============+====================================================+
{rows}
+---------------------------+---------------+----------------------------------------------------+
| NPU     Chip              | Process id    | Process name             | Process memory(MB)      |
+===========================+===============+====================================================+
| No running processes found in NPU 0                                                            |
+===========================+===============+====================================================+
"""
ROW = """\
| {n}     910B2               | {health:<13} | 94.5        40                0    / 0             |
| 0                         | 0000:C{n}:00.0  | 0           0    / 0          {used:<5}/ 65536         |
+===========================+===============+====================================================+"""


class Fake:
    """A host with NPUs, all well, of which a test takes something away."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root, self.packages, self.bin = folder / "root", folder / "packages", folder / "bin"
        for place in (self.root / "dev/shm", self.packages, self.bin):
            place.mkdir(parents=True)
        self.cards(["OK"] * 8, 3400)
        for name in (*devices.MANAGERS, *(f"davinci{n}" for n in range(8))):
            (self.root / "dev" / name).touch()
        self.program("python", "echo npu 8")
        for compiler in ("g++", "ninja"):
            self.program(compiler, "echo 1.11")
        self.cann("9.1.0")
        for name, version in HEALTHY.items():
            self.package(name, version)
        ipv4 = self.root / "proc/sys/net/ipv4"
        ipv4.mkdir(parents=True)
        (ipv4 / "ip_local_port_range").write_text("32768\t60999\n")
        (ipv4 / "ip_local_reserved_ports").write_text("60000-60015\n")
        self.llm = self.root / "workspace/MindSpeed-LLM"
        (self.llm / "megatron/core").mkdir(parents=True)
        (self.llm / "megatron/core/package_info.py").write_text("MAJOR = 0\nMINOR = 12\nPATCH = 1\nPRE_RELEASE = ''\n")
        marks = {
            "MindSpeed-LLM": "mindspeed_llm/training/arguments.py",
            "MindSpeed": "mindspeed/features_manager/__init__.py",
        }
        for name, file in marks.items():
            place = (self.llm if name == "MindSpeed-LLM" else self.packages) / file
            place.parent.mkdir(parents=True)
            place.write_text(f"# {name} as released\n")
            mark = {"file": file, "blob": installed.git_blob(place), "version": "26.1.0"}
            monkeypatch.setitem(matrix.data()["fingerprints"], name, [mark])
        self.environ = {"PATH": f"{self.bin}:/usr/bin:/bin", "HOME": str(folder), "OUTPUT_DIR": str(folder)}
        self.environ["DATA_DIR"] = str(folder)

    def program(self, name: str, body: str) -> None:
        (self.bin / name).write_text(f"#!/bin/sh\n{body}\n")
        (self.bin / name).chmod(0o755)

    def cards(self, states: list[str], used: int) -> None:
        rows = "\n".join(ROW.format(n=n, health=state, used=used) for n, state in enumerate(states))
        self.program("npu-smi", f"cat <<'TABLE'\n{NPU_SMI.format(rows=rows)}TABLE")

    def cann(self, version: str) -> None:
        info = self.root / "usr/local/Ascend/cann/aarch64-linux/ascend_toolkit_install.info"
        info.parent.mkdir(parents=True, exist_ok=True)
        info.write_text(f"package_name=Ascend-cann-toolkit\nversion={version}\narch=aarch64\n")
        header = self.root / "usr/local/Ascend/cann/include/acl/acl.h"
        header.parent.mkdir(parents=True, exist_ok=True)
        header.touch()

    def package(self, name: str, version: str | None) -> None:
        file = name.replace("-", "_")  # as pip writes it, and Python 3.11 looks for it
        for old in self.packages.glob(f"{file}-*.dist-info"):
            shutil.rmtree(old)
        if version is not None:
            folder = self.packages / f"{file}-{version}.dist-info"
            folder.mkdir()
            (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")

    def hostfile(self, *lines: str) -> None:
        file = self.root / "hosts"
        file.write_text("\n".join(lines))
        self.environ["HOSTFILE"] = str(file)

    def remove(self, path: str) -> None:
        (self.root / path).unlink()

    def doctor(self, *argv: str) -> int:
        return main.main(list(argv), Host(self.root, self.environ, (str(self.packages),), str(self.bin / "python")))


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fake:
    monkeypatch.setattr(installed.platform, "python_version", lambda: "3.10.14")
    # Which ports other programs of this machine have is not for these tests.
    monkeypatch.setattr(host, "is_free_port", lambda port: True)
    # How full this machine's disk is, likewise.
    monkeypatch.setattr(shutil, "disk_usage", lambda place: DISK)
    return Fake(tmp_path, monkeypatch)


def test_healthy_host_matches_its_row(fake: Fake, capsys: pytest.CaptureFixture[str]) -> None:
    assert fake.doctor() == 0
    out = capsys.readouterr().out
    assert "device npu, 8 x 910B2; backend mindspeed-llm" in out
    assert "MindSpeed-LLM 26.1.0: rehearsed." in out
    assert "8 of 8 npu devices visible" in out and "60.7 of 64.0 GiB free" in out
    assert "fail" not in out and "A job would run here." in out
    for row in ("driver         25.5.0", "CANN           9.1.0", "megatron-core  0.12.1", "torch_npu      2.7.1.post8"):
        assert row in out


def busy_port() -> socket.socket:
    server = socket.socket()
    server.bind(("", 0))
    server.listen()
    return server


Break = Callable[[Fake], Any]
# What is broken, the subject of the finding, what its text says, the command that fixes it.
BROKEN: dict[str, tuple[Break, str, str, str]] = {
    "no torch_npu": (
        lambda f: f.package("torch_npu", None),
        "torch_npu",
        "not installed",
        "pip install torch_npu==2.7.1.post8",
    ),
    "another torch": (
        lambda f: f.package("torch", "2.5.1"),
        "torch",
        "2.5.1; expected 2.7.1",
        "pip install torch==2.7.1",
    ),
    "numpy 2": (lambda f: f.package("numpy", "2.1.0"), "numpy", "expected <2", "pip install 'numpy<2'"),
    "old transformers": (
        lambda f: f.package("transformers", "4.45.2"),
        "transformers",
        "4.45.2",
        "pip install 'transformers==5.2.0'",
    ),
    "no CANN": (
        lambda f: f.remove("usr/local/Ascend/cann/aarch64-linux/ascend_toolkit_install.info"),
        "CANN",
        "not installed",
        "CANN 9.1",
    ),
    "CANN older than torch_npu": (
        lambda f: f.cann("8.5.0"),
        "torch_npu",
        "is for CANN 9.1, here is 8.5.0",
        "pip install torch_npu==2.7.1.post2",
    ),
    "no megatron": (
        lambda f: f.remove("workspace/MindSpeed-LLM/megatron/core/package_info.py"),
        "megatron-core",
        "not installed",
        "cp -r Megatron-LM/megatron",
    ),
    "no MindSpeed-LLM": (
        lambda f: shutil.rmtree(f.llm),
        "MindSpeed-LLM",
        "not installed; expected 26.1.0",
        "git clone -b 26.1.0 https://gitcode.com/Ascend/MindSpeed-LLM.git",
    ),
    "no device files": (lambda f: f.remove("dev/hisi_hdc"), "device files", "no hisi_hdc", "docker/run_ascend.sh"),
    "one card's file": (
        lambda f: f.remove("dev/davinci3"),
        "device",
        "means [3]",
        "export ASCEND_RT_VISIBLE_DEVICES=0,1,2,4,5,6,7",
    ),
    "a card that is not there": (
        lambda f: f.environ.update(ASCEND_RT_VISIBLE_DEVICES="0,8"),
        "device",
        "means [8]",
        "export ASCEND_RT_VISIBLE_DEVICES=0,1",
    ),
    "more processes than cards": (
        lambda f: f.environ.update(ASCEND_RT_VISIBLE_DEVICES="0,1", NPUS_PER_NODE="4"),
        "device",
        "2 of 8",
        "export NPUS_PER_NODE=2",
    ),
    "a sick card": (
        lambda f: f.cards(["OK"] * 7 + ["Alarm"], 3400),
        "health",
        "device 7 (910B2) is in state Alarm",
        "npu-smi info -t health",
    ),
    "memory taken": (lambda f: f.cards(["OK"] * 8, 64000), "device memory", "1.5 of 64.0 GiB free", "npu-smi info"),
    "torch sees a CPU": (lambda f: f.program("python", "echo cpu 64"), "torch", "but it sees cpu 64", "set_env.sh"),
    "several hosts, no address": (
        lambda f: f.environ.update(NNODES="2"),
        "hosts",
        "NNODES=2 needs MASTER_ADDR",
        "export MASTER_ADDR",
    ),
    "an address by which each host means itself": (
        lambda f: f.environ.update(NNODES="2", MASTER_ADDR="localhost"),
        "master",
        "a loopback address: every host reaches only itself",
        "export MASTER_ADDR",
    ),
    "a name that nobody knows": (
        lambda f: f.environ.update(NNODES="2", NODE_RANK="1", MASTER_ADDR="node-0.invalid"),
        "master",
        "does not resolve",
        "export MASTER_ADDR",
    ),
    "a host file without this host": (
        lambda f: f.hostfile("198.51.100.7 slots=8", "node-9"),
        "hosts",
        "(198.51.100.7, node-9)",
        "name it there",
    ),
    "a host file that is none": (
        lambda f: f.hostfile("198.51.100.7 198.51.100.8"),
        "hosts",
        "line 1",
        "expected one host",
    ),
    "a port that is none": (
        lambda f: f.environ.update(MASTER_PORT="70000"),
        "port",
        "70000 is not a port",
        "export MASTER_PORT=29500",
    ),
    "an interface that is not there": (
        lambda f: f.environ.update(HCCL_SOCKET_IFNAME="roce9"),
        "interface",
        "matches none of",
        "export HCCL_SOCKET_IFNAME=",
    ),
    "no card is visible": (
        lambda f: f.environ.update(ASCEND_RT_VISIBLE_DEVICES=""),
        "device",
        "no device is visible",
        "unset ASCEND_RT_VISIBLE_DEVICES",
    ),
    "processes that are no number": (
        lambda f: f.environ.update(NPUS_PER_NODE="abc"),
        "processes",
        "NPUS_PER_NODE=abc: expected the number",
        "unset NPUS_PER_NODE",
    ),
    "no processes": (
        lambda f: f.environ.update(NPUS_PER_NODE="0"),
        "processes",
        "NPUS_PER_NODE=0: expected the number",
        "unset NPUS_PER_NODE",
    ),
    "CANN's home is none": (
        lambda f: f.environ.update(CANN_HOME="/opt/none"),
        "CANN_HOME",
        "CANN_HOME=/opt/none has no set_env.sh",
        "unset CANN_HOME",
    ),
    "MindSpeed-LLM is elsewhere": (
        lambda f: ((f.llm / "pretrain_gpt.py").touch(), f.environ.update(MINDSPEED_LLM_HOME="/opt/none")),
        "MindSpeed-LLM",
        "not installed",
        "/root/workspace/MindSpeed-LLM",
    ),
    "no MindSpeed-LLM where it is said to be": (
        lambda f: f.environ.update(MINDSPEED_LLM_HOME="/opt/none"),
        "MindSpeed-LLM",
        "not installed",
        "MindSpeed-LLM-26.1.0 && export MINDSPEED_LLM_HOME=$PWD/MindSpeed-LLM-26.1.0",
    ),
    "CANN for which no torch_npu is": (
        lambda f: f.cann("8.0.0"),
        "torch_npu",
        "is for CANN 9.1, here is 8.0.0",
        "here is 8.0.0 fix: install toolkit, ops and nnal of CANN 9.1",
    ),
    "no g++": (
        lambda f: f.program("g++", "exit 127"),
        "compiler",
        "no g++ on the PATH; MindSpeed compiles operators",
        "apt install g++",
    ),
    "no ninja": (lambda f: f.program("ninja", "exit 127"), "compiler", "no ninja on the PATH", "pip install ninja"),
    "no headers of CANN": (
        lambda f: f.remove("usr/local/Ascend/cann/include/acl/acl.h"),
        "compiler",
        "has no include/acl/acl.h",
        "install the toolkit of CANN",
    ),
    "HCCL's port is none": (
        lambda f: f.environ.update(HCCL_IF_BASE_PORT="x"),
        "HCCL ports",
        "HCCL_IF_BASE_PORT=x",
        "unset HCCL_IF_BASE_PORT",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_broken_is_named_with_its_fix(name: str, fake: Fake, capsys: pytest.CaptureFixture[str]) -> None:
    break_it, subject, text, fix = BROKEN[name]
    break_it(fake)
    assert fake.doctor() == 1
    out = " ".join(capsys.readouterr().out.split())
    assert f"fail {subject} " in out and text in out and fix in out
    assert f"A job would fail here: {subject}" in out or f", {subject}" in out.rpartition("A job would fail here:")[2]


def test_a_torch_npu_for_another_cann_is_told_once(fake: Fake, capsys: pytest.CaptureFixture[str]) -> None:
    fake.package("torch_npu", "2.7.1")
    assert fake.doctor() == 0
    out = " ".join(capsys.readouterr().out.split())
    assert out.count("warn torch_npu ") == out.count("pip install torch_npu==") == 1
    assert "is for CANN 8.3, here is 9.1.0 fix: pip install torch_npu==2.7.1.post8" in out


def test_an_interface_that_is_suggested_is_up(
    fake: Fake, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    states = {"lo": True, "down0": False, "up0": True}
    stats = {name: argparse.Namespace(isup=up) for name, up in states.items()}
    monkeypatch.setattr(host.socket, "if_nameindex", lambda: list(enumerate(states)))
    addresses = {"127.0.0.1": "lo", "198.51.100.8": "down0", "198.51.100.9": "up0"}
    monkeypatch.setattr(hosts.psutil, "net_if_stats", lambda: stats)
    monkeypatch.setattr(hosts, "own_addresses", lambda: addresses)
    fake.environ["HCCL_SOCKET_IFNAME"] = "nope"
    assert fake.doctor() == 1
    assert "export HCCL_SOCKET_IFNAME=up0" in capsys.readouterr().out


def test_an_address_of_another_host_is_doubted(fake: Fake, capsys: pytest.CaptureFixture[str]) -> None:
    fake.environ.update(NNODES="2", MASTER_ADDR="198.51.100.7", HCCL_SOCKET_IFNAME="lo")
    assert fake.doctor() == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "warn master " in out and "not an address of this host" in out and "ip -br addr" in out


@pytest.mark.parametrize(("model", "size"), [("minimind3", 96), ("minimind2_moe", 80)])
def test_vllm_may_have_no_kernel_for_the_heads(
    fake: Fake, capsys: pytest.CaptureFixture[str], model: str, size: int
) -> None:
    fake.doctor()
    assert "head size" not in capsys.readouterr().out  # vLLM is not there
    fake.package("vllm-ascend", "0.11.0rc1")
    fake.environ["MODEL"] = model
    fake.doctor()
    out = " ".join(capsys.readouterr().out.split())
    assert f"warn head size {model}: vLLM's attention on an NPU has no kernel for heads of size {size}" in out
    assert "use the embedded engine" in out.lower()


def test_a_host_file_tells_the_place_of_this_host(fake: Fake, capsys: pytest.CaptureFixture[str]) -> None:
    fake.hostfile("198.51.100.7 slots=8", f"{socket.gethostname()} slots=8")
    fake.environ["HCCL_SOCKET_IFNAME"] = "lo"
    assert fake.doctor() == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "ok hosts this is number 1 of 2; MASTER_ADDR 198.51.100.7" in out
    assert "ok interface HCCL_SOCKET_IFNAME=lo GLOO_SOCKET_IFNAME=lo" in out


def test_cann_home_is_the_folder_of_set_env(fake: Fake, tmp_path: Path) -> None:
    info = tmp_path / "toolkit/latest/aarch64-linux" / installed.INFO
    info.parent.mkdir(parents=True)
    info.write_text("version=8.3.RC1\n")
    found = installed.cann(Host(fake.root, fake.environ | {"CANN_HOME": str(tmp_path / "toolkit")}))
    assert found.version == "8.3.RC1"


# ------------------------------------------------------------------------------------------------ a rehearsal


@pytest.fixture
def rehearsing(fake: Fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fake:
    """A host without NPUs, with the three sources beside each other."""
    monkeypatch.setattr(rehearsal, "ENVIRONMENT", tmp_path / ".venv-rehearsal")
    (fake.llm / "pretrain_gpt.py").touch()
    shutil.copytree(fake.packages / "mindspeed", fake.llm.parent / "MindSpeed/mindspeed")
    (fake.llm.parent / "MindSpeed/mindspeed/megatron_adaptor.py").touch()
    (fake.llm / "megatron").rename(fake.llm.parent / "megatron")
    (fake.llm.parent / "Megatron-LM").mkdir()
    (fake.llm.parent / "megatron").rename(fake.llm.parent / "Megatron-LM/megatron")
    fake.remove("dev/davinci_manager")
    fake.environ["REHEARSE"] = "1"
    for name, prints in {"c++": "13", "python3": "Python 3.11.2", "npu-smi": ""}.items():
        fake.program(name, f"echo {prints}" if prints else "exit 1")
    return fake


def test_what_will_be_rehearsed_is_said(rehearsing: Fake, capsys: pytest.CaptureFixture[str]) -> None:
    rehearsing.environ["NPUS_PER_NODE"] = "4"
    script = rehearsing.root / "pretrain.sh"
    script.touch()
    assert rehearsing.doctor(str(script)) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "ok rehearsal MindSpeed-LLM's own programs on this CPU, in 4 processes" in out
    workspace = rehearsing.llm.parent
    for name, version in (("MindSpeed-LLM", "26.1.0"), ("MindSpeed", "26.1.0"), ("Megatron-LM", "0.12.1")):
        assert f"ok {name} {version} at {workspace / name} " in out  # no line breaks in a path
    assert "warn environment" in out and "is not made yet" in out and "warn pretrain.sh its dry run is left out" in out
    assert "driver" not in out and "CANN " not in out and "A rehearsal would run here. 2 warnings" in out
    rehearsing.environ["BACKEND"] = "native"
    rehearsing.doctor()
    assert "the kit's own engine" in capsys.readouterr().out


def test_a_rehearsal_s_script_is_asked_where_its_environment_is_made(
    rehearsing: Fake, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rehearsal.ENVIRONMENT.mkdir()
    (rehearsal.ENVIRONMENT / "installed").touch()
    (tmp_path / "train.sh").write_text('echo "error: REHEARSE=$REHEARSE $*" >&2; exit 1\n')
    assert rehearsing.doctor(str(tmp_path / "train.sh"), "--lr", "1") == 1
    out = " ".join(capsys.readouterr().out.split())
    assert "fail train.sh REHEARSE=1 --lr 1 --dry-run" in out and "A rehearsal would fail here: train.sh." in out


REHEARSALS: dict[str, tuple[Break, str, str]] = {
    "MindSpeed-LLM": (
        lambda f: shutil.rmtree(f.llm),
        "fail MindSpeed-LLM MINDSPEED_LLM_HOME=unset: no pretrain_gpt.py in",
        "git clone -b v26.1.0",
    ),
    "MindSpeed": (
        lambda f: f.environ.update(MINDSPEED_HOME="/nowhere"),
        "fail MindSpeed MINDSPEED_HOME=/nowhere: no mindspeed/megatron_adaptor.py in /nowhere",
        "git clone -b 26.1.0_core_r0.12.1",
    ),
    "Megatron-LM": (
        lambda f: shutil.rmtree(f.llm.parent / "Megatron-LM"),
        "fail Megatron-LM MEGATRON_HOME=unset: no megatron/core/package_info.py",
        "git clone -b core_v0.12.1",
    ),
    "Python": (
        lambda f: f.program("python3", "echo Python 3.13.1"),
        "fail environment python3 is Python 3.13.1; expected Python 3.10 to 3.12",
        "export PYTHON=",
    ),
    "compiler": (
        lambda f: (f.program("c++", "exit 1"), f.program("g++", "exit 1")),
        "fail compiler no c++ or g++",
        "apt install g++",
    ),
    "hosts": (lambda f: f.hostfile("a b"), "fail hosts HOSTFILE=", "expected one host"),
}


@pytest.mark.parametrize("name", REHEARSALS)
def test_what_a_rehearsal_lacks_is_named(name: str, rehearsing: Fake, capsys: pytest.CaptureFixture[str]) -> None:
    break_it, text, fix = REHEARSALS[name]
    break_it(rehearsing)
    assert rehearsing.doctor() == 1
    out = " ".join(capsys.readouterr().out.split())
    assert text in out and fix in out


def test_another_release_to_rehearse_with_is_a_warning(rehearsing: Fake, capsys: pytest.CaptureFixture[str]) -> None:
    (rehearsing.llm / "mindspeed_llm/training/arguments.py").write_text("# changed\n")
    assert rehearsing.doctor() == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "warn MindSpeed-LLM unknown at" in out and "rehearsed was 26.1.0" in out


def test_ports_in_use(fake: Fake, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(host, "is_free_port", IS_FREE_PORT)
    with busy_port() as server:
        port = server.getsockname()[1]
        fake.environ.update(MASTER_PORT=str(port), HCCL_HOST_SOCKET_PORT_RANGE=str(port))
        assert fake.doctor() == 1
    out = capsys.readouterr().out
    assert f"MASTER_PORT={port} is in use" in out and f"{port} of {port}-{port} in use" in out


def test_what_may_go_wrong_is_a_warning(
    fake: Fake, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (fake.root / "proc/sys/net/ipv4/ip_local_reserved_ports").write_text("\n")
    usage = shutil.disk_usage(fake.root)._replace(total=64 << 20, free=64 << 30)
    monkeypatch.setattr(host.shutil, "disk_usage", lambda path: usage)
    fake.package("transformers", "4.57.1")
    assert fake.doctor() == 0
    out = capsys.readouterr().out
    assert "warn  HCCL ports" in out and "ip_local_reserved_ports=60000-60015" in out
    assert "warn  shared memory" in out and "64 MiB" in out
    assert "warn  transformers" in out


def test_full_disk(fake: Fake, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    usage = shutil.disk_usage(fake.root)._replace(free=100 << 20)
    monkeypatch.setattr(host.shutil, "disk_usage", lambda path: usage)
    assert fake.doctor() == 1
    assert "0.1 GiB free" in capsys.readouterr().out


def test_a_release_in_no_row_is_compared_with_the_nearest(fake: Fake, capsys: pytest.CaptureFixture[str]) -> None:
    (fake.llm / "mindspeed_llm/training/arguments.py").write_text("# changed\n")
    assert fake.doctor() == 0
    assert "unknown" in capsys.readouterr().out


def test_reinforcement_learning_has_rows_of_its_own(fake: Fake, capsys: pytest.CaptureFixture[str]) -> None:
    mark = fake.packages / "mindspeed_rl/config_cls/megatron_config.py"
    mark.parent.mkdir(parents=True)
    mark.write_text("# anything\n")
    assert fake.doctor() == 1
    out = capsys.readouterr().out
    assert "MindSpeed-RL master (2026-04): rehearsed in part." in out
    assert "vLLM" in out.rpartition("A job would fail here:")[2]


def test_sources_of_reinforcement_learning_are_ignored_on_a_cpu(fake: Fake, capsys: pytest.CaptureFixture[str]) -> None:
    """No row of the matrix has MindSpeed-RL on a CPU."""
    mark = fake.packages / "mindspeed_rl/config_cls/megatron_config.py"
    mark.parent.mkdir(parents=True)
    mark.write_text("# anything\n")
    fake.environ["DEVICE"] = "cpu"
    fake.doctor()
    out = capsys.readouterr().out
    assert "device cpu; backend native" in out and "rehearsed in part" not in out


def test_other_notations_of_interfaces() -> None:
    there = ["lo", "eth0", "eth1", "enp1"]
    assert hosts.matching("eth", there, prefix=True) == ["eth0", "eth1"]
    assert hosts.matching("=eth0,enp1", there, prefix=True) == ["eth0", "enp1"]
    assert hosts.matching("^eth", there, prefix=True) == ["lo", "enp1"]
    assert hosts.matching("^=eth0", there, prefix=True) == ["lo", "eth1", "enp1"]
    assert hosts.matching("eth", there, prefix=False) == []


def test_dual_chip_cards_are_two_devices(fake: Fake) -> None:
    rows = """\
| 0     Ascend910           | OK            | 178.5       36                0    / 0             |
| 0     0                   | 0000:9D:00.0  | 0           0    / 0          3416 / 65536         |
+------------------------------------------------------------------------------------------------+
| 0     Ascend910           | OK            | -           36                0    / 0             |
| 1     1                   | 0000:9F:00.0  | 0           0    / 0          3195 / 65536         |"""
    fake.program("npu-smi", f"cat <<'TABLE'\n{NPU_SMI.format(rows=rows)}TABLE")
    listed = devices.cards(Host(fake.root, fake.environ), "npu")
    assert [(card.number, card.name, card.used) for card in listed] == [(0, "Ascend910", 3416), (1, "Ascend910", 3195)]


def test_cards_of_a_container_are_numbered_from_zero(fake: Fake) -> None:
    fake.cards(["OK"] * 2, 3400)
    for n in (0, 1, 2, 3, 6, 7):
        fake.remove(f"dev/davinci{n}")
    found = {finding.subject: finding for finding in devices.check(Host(fake.root, fake.environ), "npu")}
    assert found["device"].text == "2 of 2 npu devices visible"


def test_nvidia_cards(fake: Fake) -> None:
    fake.program(
        "nvidia-smi", "echo '0, NVIDIA H100 80GB HBM3, 4, 81559'; echo '1, NVIDIA H100 80GB HBM3, 80000, 81559'"
    )
    where = Host(fake.root, fake.environ | {"CUDA_VISIBLE_DEVICES": "1"})
    found = {finding.subject: finding for finding in devices.check(where, "cuda")}
    assert found["device"].text == "1 of 2 cuda devices visible"
    assert found["device memory"].level == "fail" and "nvidia-smi" in found["device memory"].fix


# ------------------------------------------------------------------------------------------------ a script's job


def test_a_script_s_dry_run_is_asked(tmp_path: Path) -> None:
    script = tmp_path / "train.sh"
    script.write_text("echo \"$@\" >&2\necho 'error: no tokenizer at /x; give one' >&2\nexit 1\n")
    [finding] = dry_run.check(Host(), str(script), ["--lr", "1"])
    assert finding.level == "fail" and finding.text == "no tokenizer at /x; give one"
    script.write_text('[ "$*" = "--lr 1 --dry-run" ] && echo done\n')
    [finding] = dry_run.check(Host(), str(script), ["--lr", "1"])
    assert finding.level == "ok"
    with pytest.raises(UserError, match="no such script"):
        main.main([str(tmp_path / "none.sh")], Host(environ={"DEVICE": "cpu"}))
