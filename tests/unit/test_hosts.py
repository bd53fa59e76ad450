"""The hosts of a job: HOSTFILE, NNODES, MASTER_ADDR and the interfaces, and what is wrong with them."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from helpers.engine import ROOT

from minimind_mcore import hosts
from minimind_mcore.errors import UserError
from minimind_mcore.hosts import Hosts

NAME = socket.gethostname()
ELSEWHERE = "198.51.100.77"  # of a range that is nobody's (RFC 5737)


def outside() -> tuple[str, str]:
    """An interface of this machine that others can reach, and its address."""
    for name, entries in psutil.net_if_addrs().items():
        for entry in entries:
            if entry.family == socket.AF_INET and not entry.address.startswith("127."):
                return name, entry.address
    pytest.skip("this machine has no network but its loopback")


def free(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
        return True
    return False


def hostfile(folder: Path, text: str) -> str:
    file = folder / "hosts of a job"
    file.write_bytes(text.encode())
    return str(file)


def test_a_single_host_needs_nothing() -> None:
    assert hosts.read({}) == hosts.read({"NNODES": "", "HOSTFILE": "", "NODE_RANK": ""}) == Hosts(1, 0, "127.0.0.1")
    with socket.create_server(("127.0.0.1", 29500)) if free(29500) else contextlib.nullcontext():
        found = hosts.port(Hosts(1, 0, "127.0.0.1"), {})
    assert 1024 <= found < 65536 and found != 29500
    assert hosts.port(Hosts(2, 0, NAME), {}) == 29500 and hosts.port(Hosts(1, 0, NAME), {"MASTER_PORT": "6"}) == 6


@pytest.mark.parametrize("here", ["name", "address"])
def test_a_hostfile_tells_count_place_and_master(here: str, tmp_path: Path) -> None:
    own = NAME if here == "name" else outside()[1]
    text = f"\ufeff# the cluster\r\n{ELSEWHERE} slots=8  # rack 3\r\n\r\n  {own}\tslots=8 max_slots=8\r\n2001:db8::7"
    environ = {"HOSTFILE": hostfile(tmp_path, text)}
    assert hosts.read(environ) == Hosts(3, 1, ELSEWHERE)
    assert hosts.read(environ | {"NODE_RANK": "2", "MASTER_ADDR": "x", "NNODES": "3"}) == Hosts(3, 2, "x")


def test_an_alias_in_a_hostfile_is_resolved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, address = outside()
    known = {"alias": [address], "other": [ELSEWHERE], "loop": ["127.0.0.1"]}
    monkeypatch.setattr(hosts, "resolve", lambda name: known.get(name, []))
    assert hosts.read({"HOSTFILE": hostfile(tmp_path, "other\nloop\nalias\n")}).rank == 2
    known["same"] = [address]
    with pytest.raises(UserError, match="alias, same are all this host"):
        hosts.read({"HOSTFILE": hostfile(tmp_path, "alias\nsame\n")})


def test_localhost_is_a_host_of_its_own(tmp_path: Path) -> None:
    assert hosts.read({"HOSTFILE": hostfile(tmp_path, "localhost\n")}) == Hosts(1, 0, "localhost")
    with pytest.raises(UserError, match="is not in HOSTFILE"):
        hosts.read({"HOSTFILE": hostfile(tmp_path, f"localhost\n{ELSEWHERE}\n")})


# The text of a HOSTFILE, further settings, what the error says.
WRONG: dict[str, tuple[str, dict[str, str], str]] = {
    "not in it": (
        f"{ELSEWHERE}\nnode-9\n",
        {},
        rf"this host \({NAME}\) is not in HOSTFILE=.*\({ELSEWHERE}, node-9\); na",
    ),
    "two on a line": (f"a\nb {NAME}\n", {}, f"line 2: 'b {NAME}'; expected one host"),
    "a list": (f"a,{NAME}\n", {}, "line 1: 'a,"),
    "slots after a colon": (f"{NAME}:8\n", {}, "line 1: .*:8'; expected one host"),
    "twice": (f"{NAME}\na\n{NAME}\n", {}, f"line 3: {NAME} is listed twice"),
    "empty": ("# nobody\n\n", {}, "names no host"),
    "another count": (f"{NAME}\na\n", {"NNODES": "3"}, "NNODES=3, but HOSTFILE=.* names 2 hosts"),
    "too high a rank": (f"{NAME}\na\n", {"NODE_RANK": "2"}, "NODE_RANK=2: expected 0 to 1"),
    "none": ("", {"HOSTFILE": "/nowhere/hosts"}, "HOSTFILE=/nowhere/hosts: there is no such file"),
    "a folder": ("", {"HOSTFILE": "/"}, "HOSTFILE=/: cannot be read"),
    "no count": ("", {"HOSTFILE": "", "NNODES": "two"}, "NNODES=two: expected a number"),
    "no hosts": ("", {"HOSTFILE": "", "NNODES": "0"}, "NNODES=0: expected the number of hosts"),
    "no rank": ("", {"HOSTFILE": "", "NNODES": "2", "NODE_RANK": "-1", "MASTER_ADDR": "a"}, "NODE_RANK=-1: expected"),
    "no master": ("", {"HOSTFILE": "", "NNODES": "2"}, "NNODES=2 needs MASTER_ADDR"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_with_the_hosts_is_named(name: str, tmp_path: Path) -> None:
    text, settings, message = WRONG[name]
    with pytest.raises(UserError, match=message):
        hosts.read({"HOSTFILE": hostfile(tmp_path, text)} | settings)


@pytest.mark.parametrize("port", ["0", "70000", "x"])
def test_a_port_that_is_none(port: str) -> None:
    with pytest.raises(UserError, match=f"MASTER_PORT={port} is not a port"):
        hosts.port(Hosts(1, 0, NAME), {"MASTER_PORT": port})


def test_the_master_is_known_and_is_the_host_of_rank_0() -> None:
    _, address = outside()
    assert not hosts.check_master(Hosts(2, 0, address))
    assert not hosts.check_master(Hosts(2, 0, "127.0.0.1"))  # two runs on one host
    assert not hosts.check_master(Hosts(2, 1, ELSEWHERE))
    # a service's address, or a rank that was forgotten
    assert f"MASTER_ADDR={ELSEWHERE} is not an address of this host (" in hosts.check_master(Hosts(2, 0, ELSEWHERE))
    with pytest.raises(UserError, match=r"MASTER_ADDR=node-0\.invalid does not resolve"):
        hosts.check_master(Hosts(2, 1, "node-0.invalid"))


def test_interfaces_lead_to_the_master_by_themselves() -> None:
    name, address = outside()
    found = hosts.network(Hosts(2, 0, address), {})
    assert found["GLOO_SOCKET_IFNAME"] == name and found["HCCL_SOCKET_IFNAME"].removeprefix("=") == name
    assert found["HCCL_IF_IP"] == address
    said = r"MASTER_ADDR=127\.0\.0\.1 leads to a loopback address .*HCCL_SOCKET_IFNAME.*" + name
    with pytest.raises(UserError, match=said):
        hosts.network(Hosts(2, 1, "127.0.0.1"), {})


@pytest.mark.parametrize("guide", ["install_ascend.md", "install_ascend_zh.md"])
def test_the_guide_has_a_default_for_what_is_set_by_default(guide: str) -> None:
    text = (ROOT / "docs" / guide).read_text(encoding="utf-8")
    defaults = dict(re.findall(r"^\| `(\w+)` \| ([^|]+) \|", text, re.MULTILINE))
    assert "-" not in {name: defaults[name] for name in hosts.network(Hosts(2, 0, outside()[1]), {})}.values()


@pytest.mark.parametrize("notation", ["{}", "={}", "{}x,{}", "^lo", "^=lo"])
def test_gloo_gets_a_name_for_each_notation_of_hccl(notation: str) -> None:
    name, address = outside()
    given = notation.format(name, name)
    found = hosts.network(Hosts(2, 0, address), {"HCCL_SOCKET_IFNAME": given})
    assert found == {"HCCL_SOCKET_IFNAME": given, "GLOO_SOCKET_IFNAME": name}


def interfaces(monkeypatch: pytest.MonkeyPatch, **addresses: str) -> None:
    """A host with these interfaces; what has the word "down" is not up."""
    words = {name: text.split() for name, text in ({"lo": "127.0.0.1"} | addresses).items()}
    entries = {
        name: [
            SimpleNamespace(family=socket.AF_INET6 if ":" in word else socket.AF_INET, address=word)
            for word in found
            if word != "down"
        ]
        for name, found in words.items()
    }
    stats = {name: SimpleNamespace(isup="down" not in found) for name, found in words.items()}
    monkeypatch.setattr(hosts.socket, "if_nameindex", lambda: list(enumerate(entries, 1)))
    monkeypatch.setattr(hosts.psutil, "net_if_addrs", lambda: entries)
    monkeypatch.setattr(hosts.psutil, "net_if_stats", lambda: stats)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("^docker", "eth1"),  # not lo, by which this host's own name is reached, nor what is before it
        ("^docker,lo", "eth1"),
        ("^=docker0", "eth1"),
        ("eth,ib", "eth1"),
        ("=lo", "lo"),
        ("lo,eth", "eth1"),
        ("^docker,eth", "leaves lo, bond0, veth7, br0; none of them is up .* expected one of docker0, eth1 "),
        ("eth0,bond", "leaves bond0, eth0; none of them is up"),
    ],
)
def test_gloo_gets_an_interface_that_others_reach(given: str, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    interfaces(
        monkeypatch, bond0="", eth0="down 10.0.0.1", veth7="fe80::1", br0="down", docker0="172.17.0.1", eth1="10.0.0.2"
    )  # fmt: skip
    monkeypatch.setattr(hosts, "route_to", lambda name: ("lo", "127.0.0.1"))
    settings = {"HCCL_SOCKET_IFNAME": given}
    if "none" in expected:
        with pytest.raises(UserError, match=expected):
            hosts.network(Hosts(2, 0, NAME), settings)
    else:
        assert hosts.network(Hosts(2, 0, NAME), settings) == settings | {"GLOO_SOCKET_IFNAME": expected}


def test_a_name_that_is_another_s_prefix_is_meant_exactly(monkeypatch: pytest.MonkeyPatch) -> None:
    interfaces(monkeypatch, eth1="10.0.0.2", eth10="10.0.0.3")
    monkeypatch.setattr(hosts, "route_to", lambda name: ("eth1", ELSEWHERE))
    found = hosts.network(Hosts(2, 0, "a"), {})
    assert found == {"HCCL_SOCKET_IFNAME": "=eth1", "GLOO_SOCKET_IFNAME": "eth1", "HCCL_IF_IP": ELSEWHERE}
    assert hosts.network(Hosts(2, 0, "a"), {"GLOO_SOCKET_IFNAME": "eth10"})["HCCL_SOCKET_IFNAME"] == "eth10"
    assert hosts.network(Hosts(2, 0, "a"), {"HCCL_SOCKET_IFNAME": "eth"})["GLOO_SOCKET_IFNAME"] == "eth1"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"HCCL_SOCKET_IFNAME": "roce9"}, "HCCL_SOCKET_IFNAME=roce9 matches no interface"),
        ({"GLOO_SOCKET_IFNAME": "lo,roce9"}, "GLOO_SOCKET_IFNAME=lo,roce9: this host has no interface roce9; it has"),
        ({"HCCL_SOCKET_IFNAME": "lo", "GLOO_SOCKET_IFNAME": "l"}, "this host has no interface l;"),
        ({"HCCL_IF_IP": ELSEWHERE}, f"HCCL_IF_IP={ELSEWHERE} is not an address of this host"),
    ],
)
def test_interfaces_that_are_not_there(settings: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        hosts.network(Hosts(2, 1, ELSEWHERE), settings)


def test_the_program_prints_settings_and_a_dry_run_only_warns() -> None:
    environ = {key: value for key, value in os.environ.items() if not key.startswith(("HCCL", "GLOO", "MASTER"))}
    environ |= {"PYTHONPATH": str(ROOT), "NNODES": "2", "NODE_RANK": "0", "MASTER_ADDR": "node-0.invalid"}
    command = [sys.executable, "-m", "minimind_mcore.hosts", "npu"]
    refused = subprocess.run(command, env=environ, capture_output=True, text=True)
    assert (refused.returncode, refused.stdout) == (1, "") and "error: MASTER_ADDR=node-0.invalid" in refused.stderr
    planned = subprocess.run([*command, "--dry-run"], env=environ, capture_output=True, text=True)
    assert planned.stdout.split() == ["NNODES=2", "NODE_RANK=0", "MASTER_ADDR=node-0.invalid", "MASTER_PORT=29500"]
    assert "the job would fail on this host: MASTER_ADDR" in planned.stderr and planned.returncode == 0
