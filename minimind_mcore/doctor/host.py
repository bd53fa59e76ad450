"""Check what a job needs of a host besides its devices: shared memory, disk, ports, interfaces, names."""

from __future__ import annotations

import contextlib
import re
import shutil
import socket
from pathlib import Path

from minimind_mcore import hosts
from minimind_mcore.doctor.finding import Finding, fail, ok, warn
from minimind_mcore.doctor.installed import Host, cann
from minimind_mcore.errors import UserError
from minimind_mcore.hosts import is_free_port
from minimind_mcore.paths import default_outputs
from minimind_mcore.storage import existing, free_bytes

GIB = 2**30
HCCL_BASE, HCCL_COUNT = 60000, 16  # CANN: HCCL_IF_BASE_PORT


def check(host: Host, device: str) -> list[Finding]:
    """Check a host for a job on a kind of device."""
    found = [*processes(host), *shared_memory(host), *disk(host), *master(host)]
    if device == "npu":
        found += [*homes(host), *compiler(host), *hccl_ports(host)]
    return found + interfaces(host, device) + names()


def processes(host: Host) -> list[Finding]:
    """Check that NPUS_PER_NODE is a number, if set. `devices` checks whether there are as many devices."""
    given = host.environ.get("NPUS_PER_NODE") or "1"
    if given.isdecimal() and int(given) >= 1:
        return []
    text = f"NPUS_PER_NODE={given}: expected the number of processes on this host, 1 or more"
    return [fail("processes", text, "unset NPUS_PER_NODE    # one for each device")]


def homes(host: Host) -> list[Finding]:
    """Check that CANN_HOME and NNAL_HOME, if set, have the set_env.sh that every script sources."""
    found = []
    for variable, usual in (("CANN_HOME", "/usr/local/Ascend/cann"), ("NNAL_HOME", "/usr/local/Ascend/nnal/atb")):
        given = host.environ.get(variable)
        if given and not Path(given, "set_env.sh").is_file():
            text = f"{variable}={given} has no set_env.sh, so the scripts would stop"
            found.append(fail(variable, text, f"unset {variable}    # the default is {usual}; or set its directory"))
    return found


def compiler(host: Host) -> list[Finding]:
    """Check for the tools with which MindSpeed compiles operators at the first forward pass (op_builder/builder.py).

    `--use-fused-rotary-pos-emb`, which the scripts set, is such an operator. Megatron-LM also compiles a helper for its
    datasets with g++.
    """
    found = []
    for program, fix in (
        ("g++", "apt install g++    # or yum install gcc-c++"),
        ("ninja", "pip install ninja    # its folder must be on the PATH: activate the environment"),
    ):
        if not host.run(program, "--version"):
            text = f"no {program} on the PATH; MindSpeed compiles operators with it at the first forward pass"
            found.append(fail("compiler", text, fix))
    place = cann(host).where
    forms = ("", "latest/", "*-linux/", "latest/*-linux/")
    if place and not any(file for form in forms for file in Path(place).glob(f"{form}include/acl/acl.h")):
        text = f"{place} has no include/acl/acl.h; MindSpeed compiles operators with it at the first forward pass"
        fix = "install the toolkit of CANN (not only its runtime, nnrt): docs/install_ascend.md, CANN"
        found.append(fail("compiler", text, fix))
    return found or [ok("compiler", "g++, ninja and CANN's headers, for MindSpeed's operators")]


def shared_memory(host: Host) -> list[Finding]:
    """Check the size of /dev/shm, through which data loader workers pass their batches."""
    place = host.root / "dev/shm"
    if not place.is_dir():
        return []
    size = shutil.disk_usage(place).total
    if size < GIB:
        text = f"/dev/shm has {size / 2**20:.0f} MiB; workers of the data loader die of a bus error when it is full"
        fix = "docker run --shm-size=16g ... (docker/run_ascend.sh does), or run with --num-workers 0"
        return [warn("shared memory", f"{text} (Docker's default is 64 MiB)", fix)]
    return [ok("shared memory", f"/dev/shm has {size / GIB:.0f} GiB")]


def disk(host: Host) -> list[Finding]:
    """Check the free space for outputs and converted data."""
    checkout = default_outputs()
    found = []
    for variable, default in (("OUTPUT_DIR", checkout / "outputs"), ("DATA_DIR", checkout / "data")):
        place = Path(host.environ.get(variable) or default).expanduser().absolute()
        free = free_bytes(place) / GIB
        text = f"{free:.1f} GiB free at {existing(place)}"
        if free < 10:
            finding = fail if free < 1 else warn
            found.append(finding("disk", f"{text}; a checkpoint takes up to 5 GiB", f"export {variable}=/elsewhere"))
        elif not found or text != found[-1].text:
            found.append(ok("disk", text))
    return found


def master(host: Host) -> list[Finding]:
    """Check HOSTFILE, NNODES, NODE_RANK, MASTER_ADDR and MASTER_PORT, which tell where rank 0 waits for the others."""
    environ = host.environ
    try:
        job = hosts.read(environ)
    except UserError as error:
        return [_of("hosts", error)]
    found: list[Finding] = []
    if job.count > 1:
        text = f"this is number {job.rank} of {job.count}; MASTER_ADDR {job.master}"
        found.append(_master_address(job) or ok("hosts", text))
    if job.count == 1 and "MASTER_PORT" not in environ:
        return found  # a free port is chosen
    try:
        port = hosts.port(job, environ)
    except UserError as error:
        return [*found, _of("port", error)]
    if job.rank == 0 and not is_free_port(port):
        free = next((p for p in range(port + 1, 65536) if is_free_port(p)), hosts.PORT)
        return [*found, fail("port", f"MASTER_PORT={port} is in use on this host", f"export MASTER_PORT={free}")]
    return [*found, ok("port", f"MASTER_PORT {port}")]


def _master_address(job: hosts.Hosts) -> Finding | None:
    """Return what is wrong with MASTER_ADDR, or None."""
    addresses = hosts.resolve(job.master)
    if addresses and not any(map(hosts.reachable, addresses)):
        text = f"MASTER_ADDR={job.master} is {addresses[0]}, a loopback address: every host reaches only itself"
        return fail("master", text, "export MASTER_ADDR=192.168.1.10    # the address of the host with NODE_RANK=0")
    try:
        doubt = hosts.check_master(job)
    except UserError as error:
        return _of("master", error)
    return warn("master", doubt, "ip -br addr    # lists this host's addresses") if doubt else None


def _of(subject: str, error: UserError) -> Finding:
    """Convert an error of the scripts to a finding. The second line of a message, if any, is the fixing command."""
    text, _, fix = str(error).partition("\n")
    return fail(subject, text.removesuffix(":"), fix.strip())


def hccl_ports(host: Host) -> list[Finding]:
    """Check that the ports over which HCCL exchanges addresses are free, and reserved in the system."""
    given = host.environ.get("HCCL_HOST_SOCKET_PORT_RANGE")
    if given == "auto":
        return [ok("HCCL ports", "HCCL_HOST_SOCKET_PORT_RANGE=auto")]
    base = host.environ.get("HCCL_IF_BASE_PORT", str(HCCL_BASE))
    ports = _ranges(given) if given else _ranges(f"{base}-{int(base) + HCCL_COUNT - 1}" if base.isdigit() else base)
    if not ports or min(ports) < 1024 or max(ports) > 65535:
        expected = "expected a number of 1024 to 65520, or ranges such as 60000-60015"
        text = f"HCCL_IF_BASE_PORT={base}, HCCL_HOST_SOCKET_PORT_RANGE={given}: {expected}"
        return [fail("HCCL ports", text, "unset HCCL_IF_BASE_PORT HCCL_HOST_SOCKET_PORT_RANGE")]
    span = f"{ports[0]}-{ports[-1]}"
    if taken := [port for port in ports if not is_free_port(port)]:
        other = next(b for b in range(50000, 65000, 16) if all(is_free_port(b + i) for i in range(HCCL_COUNT)))
        fix = f"export HCCL_IF_BASE_PORT={other}    # 16 ports from there; the same on every host"
        return [fail("HCCL ports", f"{', '.join(map(str, taken))} of {span} in use", fix)]
    return [_reserved(host, ports, span)]


def _reserved(host: Host, ports: list[int], span: str) -> Finding:
    system = host.root / "proc/sys/net/ipv4"
    with contextlib.suppress(OSError, ValueError):
        low, high = map(int, (system / "ip_local_port_range").read_text().split())
        reserved = set(_ranges((system / "ip_local_reserved_ports").read_text().strip()))
        if any(low <= port <= high and port not in reserved for port in ports):
            text = f"the system may hand them to any program (ip_local_port_range {low}-{high})"
            fix = f"sysctl -w net.ipv4.ip_local_reserved_ports={span}"
            return warn("HCCL ports", f"{span} are free now, but {text}", fix)
    return ok("HCCL ports", f"{span} free")


def _ranges(text: str) -> list[int]:
    """Parse `60000,60050-60052` to numbers. Empty for any other form."""
    ports: list[int] = []
    for word in filter(None, re.split(r"[,\s]+", text)):
        bounds = word.split("-")
        if len(bounds) > 2 or not all(bound.isdigit() for bound in bounds):
            return []
        ports += range(int(bounds[0]), int(bounds[-1]) + 1)
    return ports


def interfaces(host: Host, device: str) -> list[Finding]:
    """Check that the interfaces selected for HCCL, gloo and NCCL exist, on NPUs also those that the scripts choose."""
    there = [name for _, name in socket.if_nameindex()]
    found = []
    variables = {"npu": ("HCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"), "cuda": ("NCCL_SOCKET_IFNAME",)}
    for variable in variables.get(device, ("GLOO_SOCKET_IFNAME",)):
        given = host.environ.get(variable)
        if given is None:
            continue
        if not hosts.matching(given, there, prefix=not variable.startswith("GLOO")):
            usable = next((name for name, reached in hosts.connected().items() if reached), "lo")
            fix = f"export {variable}={usable}"
            found.append(fail("interface", f"{variable}={given} matches none of {', '.join(there)}", fix))
        else:
            found.append(ok("interface", f"{variable}={given}"))
    if device == "npu" and all(finding.level == "ok" for finding in found):
        with contextlib.suppress(UserError):  # `master` has already reported it
            job = hosts.read(host.environ)
            hosts.check_master(job)
            found += _network(job, host) if job.count > 1 else []
    return found


def _network(job: hosts.Hosts, host: Host) -> list[Finding]:
    """Report the interfaces that the scripts set."""
    try:
        named = hosts.network(job, host.environ)
    except UserError as error:
        return [_of("interface", error)]
    return [ok("interface", " ".join(f"{name}={value}" for name, value in named.items()))]


def names() -> list[Finding]:
    """Check that this host's own name resolves, because torchrun and gloo look it up."""
    name = socket.gethostname()
    try:
        socket.getaddrinfo(name, None)
    except OSError as error:
        fix = f"echo '127.0.1.1 {name}' >> /etc/hosts, or docker run --network=host"
        return [fail("host name", f"{name} does not resolve ({error}); torchrun and gloo ask for it", fix)]
    return [ok("host name", name)]
