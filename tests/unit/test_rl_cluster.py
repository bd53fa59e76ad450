"""What the scripts of several hosts say and do before there is a cluster."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from helpers.engine import ROOT

from minimind_mcore.cli import rl
from minimind_mcore.errors import UserError
from minimind_mcore.rl.config.lint import fit
from minimind_mcore.rl.config.load import CONFIGS, compose, plain
from minimind_mcore.rl.config.objective import objective
from minimind_mcore.rl.main import program
from minimind_mcore.rl.runtime import hosts

SCRIPTS = ROOT / "examples" / "rlxf"


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    """Something that listens on this machine."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server


def address_of(server: socket.socket) -> str:
    return "{}:{}".format(*server.getsockname())


def test_an_address_is_that_of_the_way_or_of_the_interface() -> None:
    assert hosts.own_address("127.0.0.1:1", None) == "127.0.0.1"
    assert hosts.own_address(None, "lo") == "127.0.0.1"
    with pytest.raises(UserError, match=r"SOCKET_IFNAME=nowhere0: no such interface; found .*lo"):
        hosts.own_address(None, "nowhere0")
    with pytest.raises(UserError, match=r"'10\.0\.0\.1': expected HOST:PORT"):
        hosts.split("10.0.0.1")


def test_a_port_in_use_is_refused_and_one_that_nobody_answers_is_waited_for_no_longer_than_asked(
    listener: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hosts, "POLL_SECONDS", 0.05)
    address = address_of(listener)
    with pytest.raises(UserError, match=f"something listens at {address} already.*MASTER_PORT"):
        hosts.require_free(address)
    hosts.reach(address, hosts.Patience(5, None))
    listener.close()
    hosts.require_free(address)
    with pytest.raises(UserError, match=rf"after 0\.2 s: no Ray head at {address} yet; is grpo_minimind_head\.sh"):
        hosts.reach(address, hosts.Patience(0.2, None))


@pytest.mark.timeout(60)
@pytest.mark.parametrize("answer", [b"HTTP/1.1 400 Bad Request\r\n\r\n", b"SSH-2.0-OpenSSH_9.6\r\n", b""])
def test_an_address_of_something_that_is_not_ray_is_refused_and_named(
    answer: bytes, listener: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The program itself: without an answer in time it is refused, too."""
    monkeypatch.setattr(hosts, "ANSWER_SECONDS", 0.5, raising=False)
    monkeypatch.setenv("RAY_ADDRESS", address_of(listener))
    monkeypatch.setattr("ray.init", lambda **_: pytest.fail("ray.init, which would wait for ever, was called"))

    def serve() -> None:
        with suppress(OSError), listener.accept()[0] as connection:
            connection.sendall(answer)
            time.sleep(1 if not answer else 0.1)

    threading.Thread(target=serve, daemon=True).start()
    from minimind_mcore.rl.runtime.cluster import connect

    with pytest.raises(UserError, match=rf"RAY_ADDRESS={address_of(listener)}: the program .* there is not Ray"):
        connect(print)
    listener.close()
    with pytest.raises(UserError, match="no Ray cluster answers there"):
        connect(print)


def test_a_grpc_server_may_be_a_ray_head(listener: socket.socket) -> None:
    def serve() -> None:
        with suppress(OSError), listener.accept()[0] as connection:
            assert connection.recv(64).startswith(b"PRI * HTTP/2.0")
            connection.sendall(bytes([0, 0, 18, 4, 0, 0, 0, 0, 0]) + bytes(18))
            connection.recv(1)

    threading.Thread(target=serve, daemon=True).start()
    hosts.require_ray(address_of(listener), "RAY_ADDRESS")


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> rl.RLRun:
    """A run whose Ray is a program that waits, and whose directories are made in tmp_path."""
    for name in ("RAY_TMPDIR", "CONFIG", "BACKEND", "NNODES"):
        monkeypatch.setenv(name, "")
    monkeypatch.setenv("DEVICE", "cpu")
    monkeypatch.setattr(os, "environ", dict(os.environ))  # the job writes to it
    make, start = tempfile.mkdtemp, subprocess.Popen
    monkeypatch.setattr(rl.tempfile, "mkdtemp", lambda **words: make(**words | {"dir": str(tmp_path)}))
    monkeypatch.setattr(rl.subprocess, "Popen", lambda words, **rest: start(["sleep", "60"], **rest))
    monkeypatch.chdir(tmp_path)
    return rl.RLRun("single", [])


def test_the_directory_of_ray_cannot_be_guessed(job: rl.RLRun, tmp_path: Path) -> None:
    """What an earlier run's, or another user's, link of that name points to is left alone."""
    found = []
    for _ in range(2):
        os.environ["RAY_TMPDIR"] = ""
        with job.ray("head", []):
            found.append(Path(os.environ["RAY_TMPDIR"]))
    assert found[0] != found[1]
    assert all(folder.parent == tmp_path and folder.name.startswith("minimind-ray-") for folder in found)


@pytest.mark.parametrize("status, kept", [(0, False), (143, False), (1, True)])
def test_the_directory_of_ray_is_removed_unless_the_run_fails(
    job: rl.RLRun, tmp_path: Path, status: int, kept: bool
) -> None:
    with pytest.raises(SystemExit), job.ray("head", []) as process:
        folder = Path(os.environ["RAY_TMPDIR"])
        assert folder.stat().st_mode & 0o077 == 0 and process is not None
        sys.exit(status)
    assert [path for path in tmp_path.iterdir() if path.is_dir()] == [folder] * kept
    assert process is not None and not hosts.runs(process)


@pytest.mark.parametrize("closed, status", [(False, 1), (True, 0)])
def test_a_driver_whose_raylet_has_ended_says_so(closed: bool, status: int) -> None:
    script = (
        "import subprocess, threading, time; from minimind_mcore import log; "
        "from minimind_mcore.rl.runtime import cluster; log.setup(); "
        "closed = threading.Event(); "
        "raylet = subprocess.Popen(['sleep', '60']); cluster.watch_process(raylet.pid, closed); "
        f"closed.set() if {closed} else None; raylet.kill(); raylet.wait(); time.sleep(0 if {closed} else 30)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == status, done.stderr
    assert ("error: The Ray process of this host (raylet) has ended" in done.stderr) != closed


def test_a_host_whose_raylet_has_ended_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    from minimind_mcore.rl.runtime import cluster

    gone = {"NodeID": "own", "Alive": False, "NodeManagerAddress": "10.0.0.1"}
    for name, found in (
        ("get_runtime_context", SimpleNamespace(get_node_id=lambda: "own")),
        ("nodes", [gone]),
        ("cluster_resources", {}),
        ("available_resources", {}),
    ):
        monkeypatch.setattr(cluster.ray, name, lambda found=found: found)
    monkeypatch.setattr(cluster, "placement_group_table", lambda group: {"state": "RESCHEDULING"})
    alone = cluster.Cluster(True, print)
    alone.groups = [SimpleNamespace(bundle_count=1, bundle_specs=[{"CPU": 1.0}])]
    with pytest.raises(UserError, match=r"The Ray process of this host \(raylet\) has ended.*checkpoints are complete"):
        alone.wait_for_hosts(0.1)


def test_the_message_about_missing_devices_names_the_key_that_sets_their_number(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from minimind_mcore.rl.runtime import cluster, placement

    for name, found in (("nodes", [{"Alive": True}]), ("cluster_resources", {"CPU": 2.0}), ("available_resources", {})):
        monkeypatch.setattr(cluster.ray, name, lambda found=found: found)
    said: list[str] = []

    class Full(cluster.Cluster):
        """Has no resources, and notes what it says."""

        def reserve(self, count: int, bundle: dict[str, float], patience: float, what: str, *_: str) -> list[Any]:
            said.append(self._missing(count, bundle, what))
            return []

    def engines(*_: Any) -> None:
        raise UserError("here the engines would start")

    monkeypatch.setattr(placement, "connect", lambda *_, **__: Full(False, print, node="own"))
    monkeypatch.setattr(placement, "where", lambda places: "nowhere")
    monkeypatch.setattr(placement, "RolloutGroup", engines)
    words = ["minimind.rollout_resource.num_npus=3"]
    config = fit(plain(compose("grpo_minimind3_separate", words, None, "cpu")), "grpo_minimind3_separate")
    with pytest.raises(UserError, match="here the engines would start"):
        placement.WorkerGroups(config, objective(config), 6400)
    expected = (
        "actor (rl_config.actor",
        "reference (rl_config.reference",
        "group of rollout engines (minimind.rollout",
    )
    assert [text.partition("_resource) needs ")[0] for text in said] == [f"the {what}" for what in expected]
    assert "needs 3 x {'CPU': 1.0}" in said[-1] and all("actor_resource" not in text for text in said[1:])


def test_a_worker_leaves_with_the_head_and_complains_when_its_own_ray_ends(
    listener: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hosts, "POLL_SECONDS", 0.05)
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    with pytest.raises(UserError, match="Ray has ended on this host, and the head is there still"):
        hosts.follow(address_of(listener), ended.pid)
    with pytest.raises(UserError, match=r"Ray has ended on this host: no Ray head"):
        hosts.Patience(5, ended.pid).more("no Ray head", "")
    address = address_of(listener)
    listener.close()
    hosts.follow(address, os.getpid())  # returns


def test_a_node_that_does_not_end_is_killed_with_all_that_it_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hosts, "END_SECONDS", 0.5)
    deaf = "import signal, subprocess, sys, time; signal.signal(signal.SIGTERM, signal.SIG_IGN);"
    child = f"{deaf} print(1, flush=True); time.sleep(60)"
    code = f"{deaf} subprocess.Popen([sys.executable, '-c', {child!r}]); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        parent.stdout.readline()  # the child is there
        hosts.end(parent.pid)
        assert parent.stdout.read() == b""  # the last holder of the pipe is gone


def run_script(name: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A script of examples/rlxf, on a CPU."""
    own = {"PYTHON": sys.executable, "DEVICE": "cpu"}
    return subprocess.run(
        ["bash", str(SCRIPTS / name), *arguments], env=os.environ | own | environment, capture_output=True, text=True,
        timeout=120,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("name", "environment", "message"),
    [
        ("grpo_minimind_worker.sh", {}, "MASTER_ADDR is not set"),
        ("grpo_minimind_head.sh", {"NNODES": "x"}, "NNODES=x: expected a whole number of 1 or more"),
        ("grpo_minimind_head.sh", {"BACKEND": "native"}, "BACKEND=native: expected embedded or mindspeed-rl"),
        ("grpo_minimind_head.sh", {"RAY_TMPDIR": f"/tmp/{'x' * 60}", "CONFIG": "grpo_minimind3"}, "at most 40 letters"),
        ("grpo_minimind_head.sh", {"SOCKET_IFNAME": "nowhere0", "CONFIG": "grpo_minimind3"}, "no such interface"),
    ],
)
def test_the_scripts_refuse_what_cannot_work(name: str, environment: dict[str, str], message: str) -> None:
    done = run_script(name, "--dry-run", **environment)
    assert done.returncode == 1 and message in done.stderr, done.stderr


def test_the_program_is_that_of_the_configuration_s_algorithm(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text((CONFIGS / "ppo_minimind_tiny.yaml").read_text())
    done = run_script(
        "grpo_minimind_single.sh", "--dry-run", CONFIG=str(tmp_path / "mine.yaml"), DATA_DIR=str(tmp_path)
    )
    assert f"train_ppo.py --config-name mine --config-dir {tmp_path}" in done.stdout, done.stderr
    assert program(["--config-name", "ppo_minimind3", "--device", "cpu", "minimind.algorithm=cispo"]) == "train_grpo.py"


def test_a_dry_run_shows_both_hosts_commands_and_starts_nothing(tmp_path: Path) -> None:
    ray = tmp_path / "r"
    environment = {"RAY_TMPDIR": str(ray)[-40:], "NNODES": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "6344"}
    head = run_script(
        "grpo_minimind_head.sh", "--dry-run", "actor_config.lr=1e-5", DATA_DIR=str(tmp_path), **environment
    )
    assert head.returncode == 0, head.stderr
    assert "--head --port 6344 --node-ip-address 127.0.0.1" in head.stdout
    assert "MASTER_ADDR=127.0.0.1 MASTER_PORT=6344 bash examples/rlxf/grpo_minimind_worker.sh" in head.stdout
    assert "actor_config.lr=1e-5" in head.stdout and "nothing was trained" in head.stdout
    worker = run_script("grpo_minimind_worker.sh", "--dry-run", **environment)
    assert worker.returncode == 0 and "--address 127.0.0.1:6344 --node-ip-address 127.0.0.1" in worker.stdout
    assert not ray.exists() and not list(tmp_path.glob("*"))


MEETING = """
import os, socket
import torch.distributed as dist
from minimind_mcore.rl.runtime import rank
from minimind_mcore.rl.runtime.workers.train import TrainWorker

worker = TrainWorker()
address, port = worker.where()
try:
    socket.socket().bind((address, port))
except OSError as error:
    print(error.strerror)
rank.Rank = lambda *arguments: dist.init_process_group("gloo")
worker.start(None, "actor", False, (0, 1), (address, port), 1)
print(os.environ["MASTER_PORT"] == str(port), dist.get_world_size())
dist.destroy_process_group()
"""


def test_no_other_program_can_take_the_port_at_which_ranks_meet() -> None:
    done = subprocess.run([sys.executable, "-c", MEETING], capture_output=True, text=True, timeout=100, check=False)
    assert done.stdout.splitlines() == ["Address already in use", "True 1"], done.stderr


def test_each_run_on_one_host_has_ports_of_its_own(job: rl.RLRun, capfd: pytest.CaptureFixture[str]) -> None:
    """Workers of two clusters on one host would take the same ports of Ray's fixed range."""
    with job.ray("head", []):
        assert "--min-worker-port 0 --max-worker-port 0" in capfd.readouterr().out
    assert job.port != rl.RLRun("single", []).port != rl.RLRun("head", []).port == "6766"


def test_a_head_that_answers_before_its_node_is_there_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    tries: list[str] = []

    def connect(address: str, **options: object) -> None:
        tries.append(address)
        if len(tries) < 3:
            raise ConnectionError

    monkeypatch.setattr("ray.init", connect)
    monkeypatch.setattr("ray.nodes", lambda: [{"Alive": True, "NodeManagerAddress": "127.0.0.1", "Resources": {}}])
    monkeypatch.setattr("ray.shutdown", lambda: None)
    monkeypatch.setattr(hosts, "POLL_SECONDS", 0.0)
    monkeypatch.setattr(hosts, "reach", lambda *_: None)
    monkeypatch.setattr(hosts, "require_ray", lambda *_: None)
    hosts.wait("127.0.0.1:6766", 1, hosts.Patience(5, None))
    assert len(tries) == 3


def test_a_head_that_ends_while_ray_connects_ends_the_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray itself would wait for minutes."""
    forever = threading.Event()
    head = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"])

    def connect(address: str, **options: object) -> None:
        head.kill()
        forever.wait()

    monkeypatch.setattr("ray.init", connect)
    monkeypatch.setattr(hosts, "POLL_SECONDS", 0.05)
    monkeypatch.setattr(hosts, "reach", lambda *_: None)
    monkeypatch.setattr(hosts, "require_ray", lambda *_: None)
    with pytest.raises(UserError, match=r"Ray has ended on this host: the head at \S+ does not answer"):
        hosts.wait("127.0.0.1:6766", 1, hosts.Patience(60, head.pid))
    forever.set()
    head.wait()
