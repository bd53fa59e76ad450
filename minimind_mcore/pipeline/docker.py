"""`minimind-mcore run --docker`: run the stages in the Docker image for this host's device."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence

from minimind_mcore.cli.settings import show, wait_for
from minimind_mcore.errors import UserError
from minimind_mcore.models.presets import find_model, is_path
from minimind_mcore.paths import CHECKOUT
from minimind_mcore.pipeline import sample
from minimind_mcore.pipeline.job import SETTINGS, UNRECORDED
from minimind_mcore.pipeline.stages import Run, names_cases
from minimind_mcore.platform import device

logger = logging.getLogger(__name__)

COMPOSE = ["docker", "compose", "-f", str(CHECKOUT / "docker/compose.yaml")]
OUTPUTS = "/workspace/minimind-mcore/outputs"  # path inside the images
# Environment variables that a container gets, except paths.
PASSED = (*SETTINGS, *sample.SETTINGS, *UNRECORDED)
OUTSIDE = ("download", "build", "vllm", "web")  # stages that need no container or start one themselves


def build(kind: str, dry: bool) -> int:
    """Build the image for a kind of device, unless the image exists. Return the exit status."""
    image = f"minimind-mcore:{kind}"
    command = ["docker", "build", "-f", str(CHECKOUT / f"docker/Dockerfile.{kind}"), "-t", image, str(CHECKOUT)]
    if not dry:
        found = subprocess.run(["docker", "image", "inspect", image], capture_output=True)
        if found.returncode == 0:
            logger.info(f"finished before: image {image}")
            return 0
    return _step(command, {}, dry)


def run_inside(run: Run, kind: str, options: Sequence[str], stages: Sequence[str], dry: bool) -> int:
    """Run `minimind-mcore run` with these stages in a container. Return the exit status."""
    own = {"OUTPUT_DIR": f"{OUTPUTS}/{run.output.name}", **({} if run.sample else {"DATA_DIR": "/data"})}
    inside = {name: os.environ[name] for name in PASSED if os.environ.get(name)} | own
    named = {"TASK_DATA_PATH": " ".join(run.task_data), "TOKENIZER_PATH": str(run.tokenizer or "")}
    inside |= {name: value for name, value in named.items() if value}
    mounts = mounted(run)
    host = {
        "DATA": str(run.data), "OUTPUTS": str(run.output.parent), "USER_ID": str(os.getuid()),
        "GROUP_ID": str(os.getgid()),
    }  # fmt: skip
    if kind == "ascend":  # the script chooses the cards and passes settings on
        start = ["bash", str(CHECKOUT / "docker/run_ascend.sh")]
        # vllm-ascend only has attention kernels for head_dim 128.
        padded = {"PAD_HEAD_DIM": "128"} if service_of(run, kind) != "serve" else {}
        host |= padded | inside | {"MOUNTS": "\n".join(mounts)}
    else:
        passed = [word for name, value in inside.items() for word in ("-e", f"{name}={value}")]
        passed += [word for path in mounts for word in ("-v", f"{path}:{path}:ro")]
        start = [*COMPOSE, "run", "--rm", *passed, kind]
    return _step([*start, "minimind-mcore", "run", *options, *stages], host, dry)


def mounted(run: Run) -> list[str]:
    """Return the files and directories named by the user. Each is mounted read-only at the same path as on the host.

    Raises:
        UserError: a path does not exist. Docker would create an empty directory there.
    """
    paths = [("--teacher", run.teacher), ("--reward-model", run.reward_model)]
    paths += [("--model", run.model)] if is_path(run.model) else []
    pairs = zip(run.tasks, run.task_data, strict=False)
    files = [path for task, path in pairs if not names_cases(task, path)]
    paths += [("TOKENIZER_PATH", str(run.tokenizer or "")), *(("TASK_DATA_PATH", path) for path in files)]
    paths += [(f"--data {kind}", str(file)) for kind, file in run.files.items()]
    for name, path in paths:
        if path and not os.path.exists(path):
            raise UserError(f"{name}: {path} does not exist; expected a file or directory of this host")
    return list(dict.fromkeys(path for _, path in paths if path))


def service_of(run: Run, kind: str) -> str:
    """Return the service in compose.yaml. The vLLM services have flags for minimind-3, so other models use `serve`."""
    has_flags = not run.sample and find_model(run.model).qk_layernorm
    return f"serve-vllm-{kind}" if kind != "cpu" and has_flags else "serve"


def kind_of_host(dry: bool) -> str:
    """Return the kind of image for this host's device.

    Raises:
        UserError: Docker or the kit's Docker files are missing.
    """
    if not (CHECKOUT / "docker").is_dir():
        raise UserError(
            "--docker: this installation has no docker directory. Images are built from a checkout of the kit; run the "
            "command in a checkout"
        )
    if not dry and shutil.which("docker") is None:
        raise UserError(
            "--docker: the command docker was not found; install Docker, or leave out --docker to run natively"
        )
    kind = device.kind_of_host()
    return device.IMAGES.get(kind, kind)


def _step(command: Sequence[str], settings: Mapping[str, str], dry: bool) -> int:
    if dry:
        show(["env", *(f"{name}={value}" for name, value in settings.items()), *command])
        return 0
    return wait_for(command, settings)
