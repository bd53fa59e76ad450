"""Two hosts on one machine: network, process and host-name namespaces with a link between them.

Where namespaces are not allowed the hosts are two Ray nodes of this machine, with addresses of their own.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil

from minimind_mcore.rl.runtime.engines.protocol import RolloutSamplingParams
from minimind_mcore.rl.runtime.hosts import own_address
from minimind_mcore.rl.runtime.trajectory import Trajectory

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ROOT / "examples" / "rlxf"
TOOLS = os.environ["PATH"] + os.pathsep + "/usr/sbin" + os.pathsep + "/sbin"
# What makes a process, and all that it starts, a host of its own; /dev/shm has Ray's objects.
NAMESPACES = ("unshare", "--pid", "--fork", "--kill-child", "--mount-proc", "--uts")
BOOT = 'mount -t tmpfs tmpfs /dev/shm && echo "$1" > /proc/sys/kernel/hostname && shift && exec "$@"'


def _tool(*command: str) -> None:
    found = shutil.which(command[0], path=TOOLS)
    assert found, command[0]
    subprocess.run([found, *command[1:]], check=True, capture_output=True)


def why_no_namespaces() -> str:
    """Why this machine cannot hold hosts with networks of their own; empty where it can."""
    tools = [name for name in ("ip", "unshare", "mount") if shutil.which(name, path=TOOLS) is None]
    if tools or os.geteuid() != 0:
        return f"needs {', '.join(tools) or 'root'}"
    name = f"rltry{os.getpid()}"
    try:
        _tool("ip", "netns", "add", name)
        try:
            _tool("ip", "netns", "exec", name, *NAMESPACES, "bash", "-c", BOOT, "bash", "try", "true")
        finally:
            _tool("ip", "netns", "del", name)
    except subprocess.CalledProcessError as error:
        return f"namespaces are refused: {error.stderr.decode().strip()}"
    return ""


def noted(trajectories: Sequence[Trajectory], engines: Any, sampling: RolloutSamplingParams) -> None:
    """A rollout function: every engine writes the address of its host and its seeds to the file $ROLLOUTS_NOTED."""
    import ray
    from ray.exceptions import RayError

    file = os.environ["ROLLOUTS_NOTED"]
    for actor in engines.workers.actors.values():
        with contextlib.suppress(RayError):  # a lost engine: the others do its part
            ray.get(actor.__ray_call__.remote(_note, file))
    engines.generate(trajectories, sampling)


def _note(worker: Any, file: str) -> None:
    """Runs in the actor of an engine, before each call; a new actor has an engine that does not write yet."""
    import ray

    address, engine = ray.util.get_node_ip_address(), worker.engine
    if hasattr(engine, "noted"):
        return

    def generate(prompts: Any, n: int, sampling: Any, seeds: list[int]) -> Any:
        found = type(engine).generate(engine, prompts, n, sampling, seeds)
        with open(file, "a", encoding="utf-8") as lines:
            lines.write(f"{address} {' '.join(map(str, seeds))}\n")
        return found

    engine.noted, engine.generate = True, generate


class Host:
    """A host; what it runs is a script of examples/rlxf.

    Args:
        name: of the host.
        address: of it.
        namespace: of its network; None: it shares this machine's.
        folder: for its log.
    """

    def __init__(self, name: str, address: str, namespace: str | None, folder: Path) -> None:
        self.name, self.address, self.namespace = name, address, namespace
        self.log = folder / f"{name}.log"
        self.ray = Path("/tmp") / f"rlh{os.getpid()}{name[0]}"
        self.process: subprocess.Popen[bytes] | None = None

    def run(self, script: str, *arguments: str, **environment: str) -> None:
        """Start a script; what it says is added to `log`."""
        command = ["bash", str(SCRIPTS / script), *arguments]
        if self.namespace is not None:
            host = [*NAMESPACES, "bash", "-c", BOOT, "bash", self.name]
            command = [str(shutil.which("ip", path=TOOLS)), "netns", "exec", self.namespace, *host, *command]
        paths = filter(None, [str(ROOT / "tests"), os.environ.get("PYTHONPATH")])
        own = {
            "PYTHON": sys.executable, "DEVICE": "cpu", "NUM_CPUS": "1", "RAY_TMPDIR": str(self.ray),
            "MPLBACKEND": "Agg", "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths), "PATH": TOOLS,
        }  # fmt: skip
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(
                command, env=os.environ | own | environment, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT
            )

    def said(self) -> str:
        """What it has said so far."""
        return self.log.read_text(encoding="utf-8", errors="replace") if self.log.exists() else ""

    def wait(self, seconds: float) -> int:
        """Exit status of its script; the host is lost, and its log shown, where that takes too long."""
        assert self.process is not None
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.lose()
            raise AssertionError(f"{self.name}: no end within {seconds:g} s\n{self.said()}") from None

    def lose(self) -> None:
        """All its processes are gone at once."""
        if self.process is None:
            return
        processes: list[psutil.Process] = []
        if self.process.poll() is None:
            processes = [*psutil.Process(self.process.pid).children(recursive=True), psutil.Process(self.process.pid)]
        if self.namespace is not None:
            processes = processes[-1:]  # the others end with it: it is their kernel's first
        for process in processes:
            process.send_signal(signal.SIGKILL)
        self.process.wait()
        self.process = None


class Pair:
    """A head and a worker, and the link between them."""

    def __init__(self, folder: Path, namespaces: bool) -> None:
        self.spaces = [f"rl{os.getpid()}{side}" for side in "hw"] if namespaces else []
        addresses = ["10.213.7.1", "10.213.7.2"] if namespaces else [own_address(None, None), "127.0.0.2"]
        spaces = self.spaces or [None, None]
        self.head, self.worker = (
            Host(name, address, space, folder)
            for name, address, space in zip(("head", "worker"), addresses, spaces, strict=True)
        )

    def __enter__(self) -> Pair:
        if self.spaces:
            for space in self.spaces:
                _tool("ip", "netns", "add", space)
            ends = [f"v{space}" for space in self.spaces]
            _tool("ip", "link", "add", ends[0], "type", "veth", "peer", "name", ends[1])
            for space, end, host in zip(self.spaces, ends, (self.head, self.worker), strict=True):
                _tool("ip", "link", "set", end, "netns", space, "name", "link0")
                for words in (
                    f"addr add {host.address}/24 dev link0", "link set link0 up", "link set lo up",
                ):  # fmt: skip
                    _tool("ip", "-n", space, *words.split())
        return self

    def __exit__(self, *error: object) -> None:
        for host in (self.head, self.worker):
            host.lose()
            shutil.rmtree(host.ray, ignore_errors=True)
        for space in self.spaces:
            _tool("ip", "netns", "del", space)

    def cut(self) -> None:
        """The link is gone, silently."""
        _tool("ip", "-n", self.spaces[0], *"link set link0 down".split())

    def crossed(self) -> int:
        """Bytes that went over the link to the head."""
        command = ["ip", "netns", "exec", self.spaces[0], "cat", "/sys/class/net/link0/statistics/rx_bytes"]
        return int(subprocess.run(command, check=True, capture_output=True, env={"PATH": TOOLS}).stdout)

    def until(self, true: Callable[[], bool], seconds: float, what: str) -> None:
        """Wait for something; fails where the head ends, or it takes too long."""
        end = time.monotonic() + seconds
        while not true():
            ended = self.head.process is not None and self.head.process.poll() is not None
            assert not ended and time.monotonic() < end, (
                f"not {what} within {seconds:g} s\n{self.head.said()}\n{self.worker.said()}"
            )
            time.sleep(0.02)
