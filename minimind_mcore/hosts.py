"""The hosts of a job and the network between them, from the environment: for the scripts, and for the doctor.

    python -m minimind_mcore.hosts npu [--dry-run]      # for a job on NPUs; prints NAME=VALUE per setting

    HOSTFILE     a file with one host per line, the first is the master. Text after a name, as in
                 "node1 slots=8  # rack 3", is ignored. The file determines the next three settings, but
                 NODE_RANK and MASTER_ADDR take precedence if set.
    NNODES       number of hosts (default 1)
    NODE_RANK    number of this host, 0 to NNODES - 1 (default 0)
    MASTER_ADDR  address of the host with NODE_RANK 0
    MASTER_PORT  default 29500; on a single host a free port, so that two runs there do not collide

HCCL connects NPUs, and gloo connects processes. Each chooses a network interface itself. On a host with several
interfaces (docker0, a management network) the choices can differ, and then every rank waits for the others until a
timeout. Therefore both get the interface that leads to MASTER_ADDR in a job on the NPUs of several hosts.

    HCCL_SOCKET_IFNAME  interface of HCCL's handshake, in HCCL's notation (see `matching`)
    GLOO_SOCKET_IFNAME  interfaces of gloo: names separated by commas
    HCCL_IF_IP          this host's address on the interface
"""

from __future__ import annotations

import contextlib
import ipaddress
import logging
import os
import random
import re
import socket
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import ProxyHandler, Request, build_opener

import psutil

from minimind_mcore.errors import UserError, run

logger = logging.getLogger("minimind_mcore.hosts")

PORT = 29500
# Linux gives ports from 32768 on to outgoing connections and to programs that bind to port 0, so such a port could be
# taken between our choice and its use. Ray's workers listen below 20000.
FREE_PORTS = range(20000, 32000)
LINE = re.compile(r"(?P<host>\S+)(\s+\w+=\S*)*")
NAME = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9_.-]*[A-Za-z0-9_])?")


@dataclass(frozen=True)
class Hosts:
    """The number of hosts, the number of this host, and the address of the first."""

    count: int
    rank: int
    master: str


def read(environ: Mapping[str, str]) -> Hosts:
    """Return the hosts that HOSTFILE, NNODES, NODE_RANK and MASTER_ADDR describe.

    Raises:
        UserError: the settings contradict each other, or do not determine the number of this host.
    """
    listed = read_hostfile(Path(environ["HOSTFILE"])) if environ.get("HOSTFILE") else []
    count = _number(environ, "NNODES", len(listed) or 1)
    if count < 1:
        raise UserError(f"NNODES={count}: expected the number of hosts, 1 or more")
    if listed and count != len(listed):
        raise UserError(f"NNODES={count}, but HOSTFILE={environ['HOSTFILE']} names {len(listed)} hosts; unset NNODES")
    rank = 0
    if environ.get("NODE_RANK") or not listed:
        rank = _number(environ, "NODE_RANK", 0)
    else:
        rank = _index_of_this_host(listed, environ["HOSTFILE"])
    if rank >= count:
        raise UserError(
            f"NODE_RANK={rank}: expected 0 to {count - 1}, another number on each of the NNODES={count} hosts"
        )
    master = environ.get("MASTER_ADDR") or (listed[0] if listed else "")
    if count > 1 and not master:
        raise UserError(
            f"NNODES={count} needs MASTER_ADDR, the address of the host with NODE_RANK=0, on each host:\n"
            "    export MASTER_ADDR=192.168.1.10"
        )
    return Hosts(count, rank, master or "127.0.0.1")


def read_hostfile(file: Path) -> list[str]:
    """Read the hosts of a HOSTFILE, in order.

    Raises:
        UserError: the file does not exist, a line is invalid, or a host is listed twice.
    """
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = "there is no such file" if isinstance(error, FileNotFoundError) else f"cannot be read ({error})"
        raise UserError(
            f"HOSTFILE={file}: {reason}; expected a file with the name or address of one host per line"
        ) from error
    hosts: list[str] = []
    for number, line in enumerate(text.splitlines(), 1):
        words = line.partition("#")[0].strip()
        if not words:
            continue
        found = LINE.fullmatch(words)
        if not found or not (NAME.fullmatch(found["host"]) or _is_address(found["host"])):
            raise UserError(
                f"HOSTFILE={file}, line {number}: {words!r}; expected one host, by its name or address, "
                "optionally followed by words such as slots=8"
            )
        if found["host"] in hosts:
            raise UserError(f"HOSTFILE={file}, line {number}: {found['host']} is listed twice; expected each host once")
        hosts.append(found["host"])
    if not hosts:
        raise UserError(f"HOSTFILE={file} names no host; expected one host per line")
    return hosts


def _number(environ: Mapping[str, str], name: str, default: int) -> int:
    given = environ.get(name) or str(default)
    if not given.isdecimal():
        raise UserError(f"{name}={given}: expected a number")
    return int(given)


def _is_address(text: str) -> bool:
    with contextlib.suppress(ValueError):
        return bool(ipaddress.ip_address(text))
    return False


def _index_of_this_host(listed: Sequence[str], file: str) -> int:
    """Return the index of this host in a list. Names are resolved only if no entry equals this host's name."""
    name = socket.gethostname()
    mine = {name, name.partition(".")[0]} | own_addresses().keys() | ({"localhost"} if len(listed) == 1 else set())
    here = [n for n, host in enumerate(listed) if host in mine]
    here = here or [n for n, host in enumerate(listed) if any(map(reachable, set(resolve(host)) & mine))]
    if len(here) == 1:
        return here[0]
    if here:
        names = ", ".join(listed[n] for n in here)
        raise UserError(
            f"HOSTFILE={file}: {names} are all this host ({name}); expected each host once, or set NODE_RANK"
        )
    raise UserError(
        f"this host ({name}) is not in HOSTFILE={file} ({', '.join(listed)}); name it there as `hostname` does, or by "
        "its address, or set NODE_RANK"
    )


def check_master(hosts: Hosts) -> str:
    """Check that the hosts of a job can find the first host, as far as this host can tell. Return a warning or "".

    Raises:
        UserError: they cannot.
    """
    addresses = resolve(hosts.master)
    if not addresses:
        raise UserError(
            f"MASTER_ADDR={hosts.master} does not resolve on this host; give the address of the NODE_RANK=0 host:\n"
            "    export MASTER_ADDR=192.168.1.10"
        )
    mine = own_addresses()
    if hosts.rank != 0 or any(address in mine or not reachable(address) for address in addresses):
        return ""
    others = ", ".join(filter(reachable, mine))
    return (
        f"NODE_RANK=0, but MASTER_ADDR={hosts.master} is not an address of this host ({others}). This is fine behind "
        "a load balancer. Otherwise set MASTER_ADDR on every host to the address of rank 0, and give each host its "
        "own NODE_RANK"
    )


def resolve(name: str) -> list[str]:
    """Return the addresses of a host. Empty if the name is unknown."""
    with contextlib.suppress(OSError, UnicodeError):
        return list(dict.fromkeys(str(entry[4][0]) for entry in socket.getaddrinfo(name, None)))
    return []


def own_addresses() -> dict[str, str]:
    """Return the addresses of this host, with their interfaces."""
    return {
        entry.address.partition("%")[0]: name
        for name, entries in psutil.net_if_addrs().items()
        for entry in entries
        if entry.family in (socket.AF_INET, socket.AF_INET6)
    }


def reachable(address: str) -> bool:
    """Return whether other hosts may reach an address, that is whether it is not a loopback address."""
    return not ipaddress.ip_address(address.partition("%")[0]).is_loopback


def route_to(name: str) -> tuple[str, str] | None:
    """Return the interface and the address of this host from which a host is reached. None without a route."""
    for address in resolve(name):
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        with socket.socket(family, socket.SOCK_DGRAM) as probe, contextlib.suppress(OSError):
            probe.connect((address, PORT))  # a datagram socket: no packet is sent
            mine = str(probe.getsockname()[0])
            if mine in (addresses := own_addresses()):
                return addresses[mine], mine
    return None


def matching(given: str, there: Sequence[str], prefix: bool) -> list[str]:
    """Return the interfaces that match HCCL_SOCKET_IFNAME: `eth` is a prefix, `=eth0` is exact, `^` negates.

    Args:
        given: names separated by commas.
        there: interfaces of this host.
        prefix: False for names that are always exact, as gloo's.
    """
    exclude, rest = given.startswith("^"), given.removeprefix("^")
    exact, rest = rest.startswith("=") or not prefix, rest.removeprefix("=")
    words = [word for word in rest.split(",") if word]
    hits = [name for name in there if any(name == word if exact else name.startswith(word) for word in words)]
    return [name for name in there if name not in hits] if exclude else hits


def connected() -> dict[str, bool]:
    """Return the interfaces of this host that are up and have an address, and whether other hosts may reach them.

    A link-local IPv6 address (fe80::), which every interface has, does not count.
    """
    up = [name for name, stats in psutil.net_if_stats().items() if stats.isup]
    addresses = [
        (name, address)
        for address, name in own_addresses().items()
        if name in up and not (":" in address and ipaddress.ip_address(address).is_link_local)
    ]
    return {name: any(reachable(a) for other, a in addresses if other == name) for name, _ in addresses}


def _for_gloo(given: str, fitting: Sequence[str], preferred: str) -> str:
    """Choose gloo's interface among those that match HCCL_SOCKET_IFNAME: `preferred` if it is one of them.

    The loopback, which `^docker` matches too, is chosen only if it is named.
    """
    there = connected()
    usable = [name for name in fitting if there.get(name)]
    if not usable and not given.startswith("^"):
        usable = [name for name in fitting if name in there]
    if not usable:
        raise UserError(
            f"HCCL_SOCKET_IFNAME={given} leaves {', '.join(fitting)}; none of them is up with an address that other "
            f"hosts reach; expected one of {', '.join(name for name, reached in there.items() if reached) or 'these'} "
            "(`ip -br addr` lists them)"
        )
    return preferred if preferred in usable else usable[0]


def network(hosts: Hosts, environ: Mapping[str, str]) -> dict[str, str]:
    """Return the settings of HCCL and gloo for a job on the NPUs of several hosts.

    Settings in `environ` are kept. Missing ones follow from them, or from the route to the master.

    Raises:
        UserError: this host lacks a given interface or address, or has no route to the master.
    """
    there = [name for _, name in socket.if_nameindex()]
    hccl, gloo = environ.get("HCCL_SOCKET_IFNAME", ""), environ.get("GLOO_SOCKET_IFNAME", "")
    route, address = route_to(hosts.master), environ.get("HCCL_IF_IP", "")
    if address and address not in own_addresses():
        mine = ", ".join(filter(reachable, own_addresses()))
        raise UserError(f"HCCL_IF_IP={address} is not an address of this host ({mine}); it differs from host to host")
    if hccl:
        fitting = matching(hccl, there, prefix=True)
        if not fitting:
            raise UserError(f"HCCL_SOCKET_IFNAME={hccl} matches no interface of this host; it has {', '.join(there)}")
        gloo = gloo or _for_gloo(hccl, fitting, route[0] if route else "")
    elif not gloo:
        if route is None or not reachable(route[1]):
            found = "is not reachable from any interface of this host"
            if route:
                found = f"leads to a loopback address ({route[1]}): every host reaches only itself"
            raise UserError(
                f"MASTER_ADDR={hosts.master} {found}; give the address by which the others reach it, or set "
                f"HCCL_SOCKET_IFNAME to the interface that leads there, of {', '.join(there)}"
            )
        gloo, address = route[0], address or route[1]
    if missing := [name for name in gloo.split(",") if name not in there]:
        raise UserError(
            f"GLOO_SOCKET_IFNAME={gloo}: this host has no interface {', '.join(missing)}; it has {', '.join(there)}"
        )
    # `=` if another interface has this name as a prefix
    hccl = hccl or (gloo if matching(gloo, there, prefix=True) == gloo.split(",") else f"={gloo}")
    named = {"HCCL_SOCKET_IFNAME": hccl, "GLOO_SOCKET_IFNAME": gloo, "HCCL_IF_IP": address}
    return {name: value for name, value in named.items() if value}


def port(hosts: Hosts, environ: Mapping[str, str]) -> int:
    """Return MASTER_PORT, or a port to use instead.

    Raises:
        UserError: the value is not a port.
    """
    given = environ.get("MASTER_PORT")
    if given:
        if not given.isdecimal() or not 0 < int(given) < 65536:
            raise UserError(f"MASTER_PORT={given} is not a port; expected 1 to 65535:\n    export MASTER_PORT={PORT}")
        return int(given)
    return PORT if hosts.count > 1 else free_port()


def open_local(request: str | Request, timeout: float) -> HTTPResponse:
    """Send a request to a server on this host. The proxy of http_proxy is ignored, because it cannot reach this host.

    Raises:
        OSError: nothing answers, or the answer is an error.
    """
    found: HTTPResponse = build_opener(ProxyHandler({})).open(request, timeout=timeout)
    return found


def health(url: str, timeout: float) -> int | None:
    """Return the HTTP status of /health of a server of this host; None if nothing answers."""
    try:
        with open_local(f"{url}/health", timeout) as reply:
            return reply.status
    except HTTPError as error:
        return error.code
    except (OSError, HTTPException):
        return None


def is_marked(pid: int, variable: str, mark: str) -> bool:
    """Return whether a process of this host runs and has this value of an environment variable.

    Another process may have got the same id, so the variable identifies the process. The start time does not, because
    it changes when the system's clock is set.
    """
    try:
        process = psutil.Process(pid)
        return bool(process.environ().get(variable) == mark and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.Error:
        return False


def in_url(host: str) -> str:
    """Return a host in URL form: an IPv6 address in brackets."""
    return f"[{host}]" if ":" in host else host


def free_port() -> int:
    """Return a port of this host that nothing uses.

    Raises:
        UserError: no port is free.
    """
    # The system's generator: programs with the same seed must not choose the same port.
    for port in random.SystemRandom().sample(FREE_PORTS, len(FREE_PORTS)):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("", port))
            return port
    raise UserError(f"all ports from {FREE_PORTS[0]} to {FREE_PORTS[-1]} of this host are in use; end other programs")


@contextlib.contextmanager
def port_errors(address: str, number: str) -> Iterator[None]:
    """Turn a failure to listen on MASTER_PORT, or to reach it, into a `UserError`."""
    try:
        yield
    except RuntimeError as error:  # torch.distributed.DistNetworkError; this module does not import torch
        if type(error).__name__ not in ("DistNetworkError", "DistStoreError"):
            raise
        if "EADDRINUSE" in str(error) or "in use" in str(error):
            raise _in_use(number) from error
        raise UserError(
            f"MASTER_ADDR={address}, MASTER_PORT={number}: the host of rank 0 was not reached "
            f"({str(error).strip().splitlines()[0]}); start the run on each host, with the same address and port"
        ) from error


def require_free_port(number: int) -> None:
    """Check that rank 0 can listen on MASTER_PORT of this host.

    Raises:
        UserError: another program uses the port.
    """
    if not is_free_port(number):
        raise _in_use(str(number))


def is_free_port(number: int) -> bool:
    """Return whether nothing on this host listens on a port."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as rank 0: closed connections do not matter
        try:
            probe.bind(("", number))
        except OSError:
            return False
    return True


def _in_use(number: str) -> UserError:
    return UserError(
        f"MASTER_PORT={number} is in use on this host{_user_of(number)}; end that program, or set another "
        "MASTER_PORT, the same on each host (on a single host unset it, and a free one is found)"
    )


def _user_of(number: str) -> str:
    """Describe the process that listens on a port, if this user may see it."""
    with contextlib.suppress(psutil.Error, OSError):
        for entry in psutil.net_connections("tcp"):
            if entry.status == psutil.CONN_LISTEN and entry.laddr and str(entry.laddr.port) == number and entry.pid:
                return f" by process {entry.pid} ({psutil.Process(entry.pid).name()})"
    return ""


def runs(process: int) -> bool:
    """Return whether a process of this host runs and is not a zombie."""
    with contextlib.suppress(psutil.Error):
        return bool(psutil.Process(process).status() != psutil.STATUS_ZOMBIE)
    return False


def named(hosts: Hosts, ascend: bool, dry: bool) -> dict[str, str]:
    """Return the variables that select the interfaces of a job on several Ascend hosts, and log them.

    Raises:
        UserError: the job would fail on this host. A dry run only warns, because it may run on another host.
    """
    found: dict[str, str] = {}
    if hosts.count > 1:
        try:
            if doubt := check_master(hosts):
                logger.warning(doubt)
            found = network(hosts, os.environ) if ascend else {}
        except UserError as error:
            if not dry:
                raise
            logger.warning(f"the job would fail on this host: {error}")
    if found:
        logger.info(" ".join(["network:", *(f"{name}={value}" for name, value in found.items())]))
    return found


def main() -> None:
    """Print the settings for a shell, as NAME=VALUE."""
    hosts = read(os.environ)
    settings = {"NNODES": hosts.count, "NODE_RANK": hosts.rank, "MASTER_ADDR": hosts.master}
    settings["MASTER_PORT"] = port(hosts, os.environ)
    for name, value in (settings | named(hosts, "npu" in sys.argv, "--dry-run" in sys.argv)).items():
        print(f"{name}={value}")


if __name__ == "__main__":
    run(main)
