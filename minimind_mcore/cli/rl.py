"""minimind-mcore rl ...: reinforcement learning.

    minimind-mcore rl single                    # train on this host
    NNODES=2 minimind-mcore rl head             # train on several hosts; this host is the head of the Ray cluster
    MASTER_ADDR=10.0.0.1 minimind-mcore rl worker     # join this host to the cluster of that head
    minimind-mcore rl show|lint|export-verl     # print, check or export a configuration; `rl lint --help`
    minimind-mcore rl models                    # write the presets as MindSpeed-RL's model/*.yaml

Settings of `single`, `head` and `worker`, from the environment:
  CONFIG         the name of a YAML file in configs/rlxf, or a path (default: grpo_minimind_tiny on a CPU and in a
                 rehearsal, else grpo_minimind3)
  BACKEND        embedded or mindspeed-rl (default: mindspeed-rl on an NPU, else embedded)
  NNODES         hosts of the cluster, for `head` (default: 1)
  MASTER_ADDR    address of the head; `head` chooses one by default
  MASTER_PORT    Ray's port on the head (default: 6766, as in MindSpeed-RL's scripts; its older guides use 6344; for
                 `single` a free port)
  NODE_ADDR      address of this host, for `worker` (default: the address of the route to the head)
  SOCKET_IFNAME  network interface of this host (default: the interface of the route to the head)
  NPUS_PER_NODE NUM_CPUS   devices and CPU cores of this host that Ray may use (default: all)
  RAY_ADDRESS    for `single`: an existing cluster, HOST:PORT (default: a new cluster that ends with the run)
  RAY_TMPDIR     directory of Ray's logs and sockets (default: a new directory /tmp/minimind-ray-XXXXXX, which is
                 removed at the end unless the run fails)
  RAY_FLAGS      more flags of `ray start`, such as "--min-worker-port 20000 --max-worker-port 20999"
  WAIT_SECONDS   time to wait for the head or for hosts (default: 600)
Further arguments are Hydra overrides, such as actor_config.lr=1e-6. Paths in the YAML file and in overrides are
relative to the repository. --dry-run checks everything and starts nothing.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from minimind_mcore.checkpoint.tracker import read_tracker
from minimind_mcore.cli import launcher, quickstart
from minimind_mcore.cli.data import MATH_SFT, PROBLEMS
from minimind_mcore.cli.settings import CLI, choice, count, data_dir, env, help_of, show, wait_for
from minimind_mcore.errors import UserError
from minimind_mcore.hosts import free_port
from minimind_mcore.paths import default_outputs
from minimind_mcore.platform import device
from minimind_mcore.platform.processor import usable_cores

logger = logging.getLogger(__name__)

LONGEST = 40  # characters of RAY_TMPDIR: Ray appends up to 65, and a socket path has at most 107
STOPPED = (0, 130, 143)  # exit statuses of a run that has not failed


def main(argv: Sequence[str]) -> None:
    """Train, or run one of the configuration tools."""
    command, *rest = argv or ["--help"]
    if command in ("single", "head", "worker"):
        help_of(rest, __doc__)
        sys.exit(run(command, rest))
    if command == "models":
        from minimind_mcore.rl import models

        models.main(rest)
    else:
        from minimind_mcore.rl import commands

        if command in ("-h", "--help"):
            print(__doc__)
        commands.main([command, *rest])


def run(role: str, argv: Sequence[str]) -> int:
    """Train on this host, start the head of a cluster, or join one. Return the exit status."""
    job = RLRun(role, argv)
    if role == "worker" and not job.leader:
        raise UserError("MASTER_ADDR is not set: give the address of the host that runs grpo_minimind_head.sh")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    if role == "worker":
        return job.follow()
    job.prepare()
    # MindSpeed-RL reads the number of NPUs from a Ray cluster, so it needs one even on a single host.
    if role == "head" or (job.backend == "mindspeed-rl" and not env("RAY_ADDRESS")):
        return job.lead()
    os.environ["RAY_ADDRESS"] = env("RAY_ADDRESS", "local")
    return job.train()


class RLRun:
    """A reinforcement learning run, or this host's part of one.

    Args:
        role: "single", "head" or "worker".
        argv: Hydra overrides, and --dry-run.

    Raises:
        UserError: a setting is wrong.
    """

    def __init__(self, role: str, argv: Sequence[str]) -> None:
        self.role, self.dry = role, "--dry-run" in argv
        self.overrides = [word for word in argv if word not in ("--dry-run", "--data-pending")]
        self.rehearses = env("REHEARSE", "0") != "0"
        own_port = str(free_port()) if role == "single" else "6766"
        self.leader, self.port = env("MASTER_ADDR"), env("MASTER_PORT", own_port)
        for name in ("MASTER_ADDR", "MASTER_PORT"):  # these are for Ray; the actors choose their own
            os.environ.pop(name, None)
        found = device.current()
        os.environ["DEVICE"] = found.kind
        self.on_cpu, self.ascend, self.devices = found.kind == "cpu", found.is_ascend, launcher.processes()
        config = env("CONFIG", "grpo_minimind_tiny" if self.on_cpu or self.rehearses else "grpo_minimind3")
        self.config = Path(config).absolute() if Path(config).is_file() else Path(config)
        os.chdir(default_outputs())  # paths in the YAML file and in overrides are relative to this directory
        self.backend = choice("BACKEND", "mindspeed-rl" if self.ascend else "embedded", "embedded", "mindspeed-rl")
        self.nodes, self.seconds = count("NNODES", 1), float(env("WAIT_SECONDS", "600"))
        # The check of MindSpeed-RL's batch sizes reads NNODES.
        os.environ.update(NNODES=str(self.nodes), BACKEND=self.backend, RAY_AUTH_MODE=env("RAY_AUTH_MODE", "disabled"))
        self.where = ["--config-name", self.config.name.removesuffix(".yaml")]
        if self.config.is_file():
            self.where += ["--config-dir", str(self.config.parent)]
        self.prepared: list[str] = []  # overrides for the sample data and model
        self.pending = "--data-pending" in argv  # dry run: the data does not exist yet

    def lead(self) -> int:
        """Start the head of a Ray cluster, wait for the other hosts to join, and train."""
        from minimind_mcore.rl.runtime import hosts

        leader = self.leader or hosts.own_address(None, env("SOCKET_IFNAME") or None)
        address = os.environ["RAY_ADDRESS"] = f"{leader}:{self.port}"
        if not self.dry:
            hosts.require_free(address)
        head = ["--head", "--port", self.port, "--node-ip-address", leader, "--include-dashboard=false"]
        head += ["--system-config", json.dumps(hosts.SYSTEM_CONFIG)]
        with self.ray("head", head) as process:
            if self.nodes > 1:
                logger.info(
                    f"on each of the other {self.nodes - 1} hosts: MASTER_ADDR={leader} MASTER_PORT={self.port} "
                    "bash examples/rlxf/grpo_minimind_worker.sh"
                )
            if process:
                hosts.wait(address, self.nodes, hosts.Patience(self.seconds, process))
            return self.train()

    def follow(self) -> int:
        """Join the cluster of the head, and stay until the head is gone."""
        from minimind_mcore.rl.runtime import hosts

        address = f"{self.leader}:{self.port}"
        hosts.split(address)
        if not self.dry:
            hosts.reach(address, hosts.Patience(self.seconds, None))
        own = env("NODE_ADDR") or hosts.own_address(address, env("SOCKET_IFNAME") or None)
        with self.ray(f"worker-{own}", ["--address", address, "--node-ip-address", own]) as process:
            if process:
                hosts.follow(address, process)
        return 0

    @contextlib.contextmanager
    def ray(self, name: str, flags: Sequence[str]) -> Iterator[int | None]:
        """Run a Ray node on this host during the block, and leave other nodes alone. Yield the process id."""
        from minimind_mcore.rl.runtime import hosts

        folder = env("RAY_TMPDIR", "/tmp/minimind-ray-XXXXXX")
        if len(folder) > LONGEST:
            raise UserError(f"RAY_TMPDIR={folder} is too long for the paths of sockets: at most {LONGEST} letters")
        # mkdtemp, because another user could have placed a link at a predictable name in /tmp.
        made = "" if self.dry or env("RAY_TMPDIR") else tempfile.mkdtemp(prefix="minimind-ray-", dir="/tmp")
        folder = os.environ["RAY_TMPDIR"] = made or folder
        cpus = env("NUM_CPUS", str(usable_cores()))
        node = ["--block", "--num-cpus", cpus, "--disable-usage-stats", "--temp-dir", folder, *flags]
        if self.ascend:
            node += ["--resources", f'{{"NPU": {self.devices}}}']
        else:
            node += ["--num-gpus", "0" if self.on_cpu else str(self.devices)]
        # Ray's default port range is fixed, so the workers of two clusters on one host would collide.
        if self.role == "single":
            node += ["--min-worker-port", "0", "--max-worker-port", "0"]
        node += shlex.split(env("RAY_FLAGS"))
        if interface := env("SOCKET_IFNAME"):
            device.name_interface(interface)
        show(["ray", "start", *node])
        if self.dry:
            yield None
            return
        Path(folder).mkdir(parents=True, exist_ok=True)
        log = Path(folder, f"{name}.log")
        with log.open("wb") as output:
            command = [sys.executable, "-m", "ray.scripts.scripts", "start", *node]
            process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        status: int | str | None = 1
        try:
            yield process.pid
            status = 0
        except SystemExit as error:
            status = error.code
            raise
        except KeyboardInterrupt:
            status = 130
            raise
        except UserError:
            last = log.read_text(encoding="utf-8", errors="replace").splitlines()[-15:]
            logger.warning("\n".join([f"the end of {log}:", *last]))
            raise
        finally:
            hosts.end(process.pid)
            if made and status in STOPPED:
                shutil.rmtree(made, ignore_errors=True)

    def prepare(self) -> None:
        """Make the sample data of the tiny configurations, and a model fine-tuned on it with wrong carries.

        This happens before Ray starts, because other hosts join as soon as Ray runs.
        """
        if not self.config.name.endswith("_tiny"):
            return
        own_data = any(".data_path=" in word for word in self.overrides)
        evaluates = any(word.startswith("minimind.eval_interval=") for word in self.overrides)
        own_model = any(word.startswith("actor_config.load=") for word in self.overrides)
        if own_data and own_model:
            return
        folder, outputs = data_dir() / "quickstart", default_outputs() / "outputs"
        base = outputs / ("rehearsal/quickstart" if self.rehearses else "quickstart")
        tuned = base / "full_sft/checkpoints"
        begin = outputs / ("rehearsal" if self.rehearses else "minimind3_tiny") / "math_sft/checkpoints"
        here = {"BACKEND": "native", "DATA_DIR": str(folder), "TOKENIZER_PATH": str(folder / "tokenizer")}
        if self.rehearses:  # data and model are made without the emulated torch_npu
            here["DEVICE"], here["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "cpu", "0"
        if not (folder / f"{PROBLEMS}_unseen_packed_labels_document.idx").is_file() or not is_finished(tuned):
            # This model adds correctly, but does not know the answer format yet.
            short = {"TRAIN_ITERS": "60"} if self.rehearses else {}
            stages = ("run", "--sample", "pretrain", "full_sft")
            self.make({**here, **short, "OUTPUT_DIR": str(base)}, *stages)
            self.make(here, "data", PROBLEMS)
        if not is_finished(begin) and not own_model:
            iterations = 60 if self.rehearses else quickstart.MATH_SFT_ITERATIONS
            tuning = {
                **here, **quickstart.math_sft(self.devices, iterations), "CKPT_LOAD_DIR": str(tuned),
                "DATA_PATH": str(folder / MATH_SFT), "OUTPUT_DIR": str(begin.parent),
            }  # fmt: skip
            self.make(tuning, "sft", *quickstart.schedule(iterations))
        model = here["TOKENIZER_PATH"]
        if self.backend == "mindspeed-rl" and not (own_data or own_model):
            model = str(begin.parent / "hf")  # vLLM reads the config.json next to the tokenizer
            if not Path(model, "config.json").is_file():
                self.make({**here, "LOAD_DIR": str(begin), "SAVE_DIR": model}, "convert", "mcore2hf")
        if not own_data:
            self.prepared += [f"megatron_training.data_path={folder / PROBLEMS}"]
            self.prepared += [f"megatron_training.tokenizer_name_or_path={model}"]
        if not own_model:
            self.prepared.append(f"actor_config.load={begin}")
        if self.rehearses:
            self.prepared += [f"megatron_training.{key}=2" for key in ("train_iters", "save_interval")]
            self.prepared.append(f"minimind.output_dir={outputs / 'rehearsal/grpo'}")
            self.prepared.append(f"actor_config.save={outputs / 'rehearsal/grpo/checkpoints'}")
        if self.backend == "embedded" and not evaluates:
            self.prepared.append("minimind.eval_interval=20")

    def make(self, changes: dict[str, str], *command: str) -> None:
        """Run a command of the kit with these settings. In a dry run print the command."""
        if self.dry:
            self.pending = True
            show(["env", *(f"{k}={v}" for k, v in changes.items()), *CLI, *command])
        elif status := wait_for([*CLI, *command], {"OUTPUT_DIR": None, "NNODES": None, **changes}):
            sys.exit(status)

    def train(self) -> int:
        """Run train_grpo.py or train_ppo.py, whichever the configuration needs. Return the exit status."""
        from minimind_mcore.rl.main import program

        name = program([*self.where, *self.overrides])
        command = [*CLI, name, *self.where, *self.prepared, *self.overrides]
        show(command)
        if not self.dry:
            return wait_for(command)
        command += ["--dry-run", *(["--data-pending"] if self.pending else [])]
        launcher.run_here(name, command[len(CLI) + 1 :])
        return 0


def is_finished(checkpoints: Path) -> bool:
    """Return whether a directory has checkpoints."""
    return bool(read_tracker(checkpoints))
