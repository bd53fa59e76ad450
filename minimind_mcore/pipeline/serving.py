"""Start the server of a run in the background, send one test request, and leave the server running."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import secrets
import shlex
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path

import psutil

from minimind_mcore.cli.settings import CLI, choice, show, wait_for
from minimind_mcore.errors import UserError
from minimind_mcore.hosts import health, is_marked, open_local
from minimind_mcore.pipeline.docker import COMPOSE, service_of
from minimind_mcore.pipeline.stages import UNSET, Run
from minimind_mcore.storage import atomic_write_text

logger = logging.getLogger(__name__)

SECONDS = 600  # time to wait for a server: on a GPU it may compile kernels first
HEALTH_SECONDS = 5.0  # timeout of a health request
QUESTION = "17+25=?"
SETTINGS = ("ENGINE", "PRECISION", "TEMPERATURE", "TOP_K", "TOP_P")  # if one changes, the server starts again
MARK = "MINIMIND_PIPELINE_SERVER"  # environment variable that identifies the server's process


def serve(run: Run, kind: str, dry: bool) -> None:
    """Start the server of the converted model unless it runs, send one chat, and print address and stop command.

    Args:
        run: run whose converted model is served.
        kind: kind of Docker image, "cpu", "cuda" or "ascend"; "" without Docker.
        dry: only print and check the command.

    Raises:
        UserError: there is no converted model, or the server does not answer.
    """
    model, log, state = run.output / "hf", run.output / "server.log", run.output / "server.json"
    settings = {**UNSET, "LOAD_DIR": str(model), "PORT": str(run.port), "OUTPUT_DIR": ""}
    command, service = [*CLI, "serve"], service_of(run, kind) if kind else ""
    if service:
        settings = {"MODELS": str(run.output), "LOAD_DIR": "/models/hf", "PORT": str(run.port)}
        # Without --force-recreate compose keeps a running container, which would serve the old weights.
        command = compose(service, "up", "--detach", "--force-recreate")
    there = (model / "config.json").is_file()
    if dry:
        require_model(run)
        show(["env", *(f"{name}={value}" for name, value in settings.items() if value), *command])
        if there and not service and wait_for([*command, "--dry-run"], settings):
            raise UserError(f"the model in {model} cannot be served")
        return
    if not there:
        raise UserError(f"{model} has no model: run the stage convert first")
    weights = run.records.read("convert").get("outputs", {})
    before = json.loads(state.read_text(encoding="utf-8")) if state.is_file() else {}
    chosen = {name: os.environ[name] for name in SETTINGS if os.environ.get(name)}
    wanted = {"weights": weights, "port": run.port, "service": service, "settings": chosen}
    if all(before.get(name) == value for name, value in wanted.items()) and _alive(before):
        logger.info(f"already serving: {service or before['pid']}")
    else:
        stop(before)
        if health(address(run), HEALTH_SECONDS) is not None:
            raise UserError(
                f"port {run.port} is used by another server; stop that server, or give another port with --port"
            )
        with log.open("wb") as output:
            mark = secrets.token_hex(16)
            process = subprocess.Popen(
                command, env=os.environ | settings | {MARK: mark}, stdout=output, stderr=subprocess.STDOUT,
                start_new_session=True,
            )  # fmt: skip
        before = wanted if service else wanted | {"pid": process.pid, "mark": mark}
        atomic_write_text(state, json.dumps(before))
        _wait(address(run), process, log, bool(service))
    stopping = shlex.join(compose(service, "rm", "--stop", "--force")) if service else f"kill {before['pid']}"
    print(f"{QUESTION} {_ask(address(run))!r}")
    print(f"address     {address(run)}/v1 (model minimind)")
    print(f"to stop     {stopping}", flush=True)


def require_engine() -> None:
    """Check the setting ENGINE.

    Raises:
        UserError: ENGINE has an unknown value, or asks for vLLM, which is not installed.
    """
    if choice("ENGINE", "auto", "auto", "embedded", "vllm") == "vllm" and importlib.util.find_spec("vllm") is None:
        raise UserError("ENGINE=vllm: vLLM is not installed; install vLLM, or unset ENGINE")


def require_model(run: Run) -> None:
    """Check that there is a converted model, or that an earlier stage of the run makes it.

    Raises:
        UserError: there is neither.
    """
    if not (run.output / "hf/config.json").is_file() and "convert" not in run.before("vllm"):
        raise UserError(f"{run.output / 'hf'} has no model: run the stage convert first")


def compose(service: str, *words: str) -> list[str]:
    """Return a `docker compose` command line for a service."""
    return [*COMPOSE, "--profile", service, *words, service]


def page(run: Run) -> None:
    """Print the address of the chat page, or how to get one if the server is vLLM."""
    try:
        with open_local(f"{address(run)}/", timeout=10) as reply:
            has_page = b'src="chat.js"' in reply.read()
    except urllib.error.HTTPError:
        has_page = False
    except OSError as error:
        raise UserError(f"{address(run)} does not answer ({error}): run the stage vllm first") from error
    if has_page:
        print(f"chat page   {address(run)}/")
    else:
        print(
            f"vLLM has no chat page. Serve any model with ENGINE=embedded, and open its page with ?api={address(run)}"
        )


def address(run: Run) -> str:
    """Return the server's address on this host."""
    return f"http://127.0.0.1:{run.port}"


def stop(state: dict[str, object]) -> None:
    """Stop the server of a previous run, if it is still running."""
    if service := state.get("service"):
        subprocess.run(compose(str(service), "rm", "--stop", "--force"), check=True)
    elif _alive(state):
        process = psutil.Process(int(str(state["pid"])))
        process.terminate()
        process.wait(60)


def _alive(state: dict[str, object]) -> bool:
    """Return whether the recorded service or process still runs."""
    if service := state.get("service"):
        listed = subprocess.run(compose(str(service), "ps", "--quiet", "--status", "running"), capture_output=True)
        return bool(listed.stdout.strip())
    return "mark" in state and is_marked(int(str(state["pid"])), MARK, str(state["mark"]))


def _wait(url: str, process: subprocess.Popen[bytes], log: Path, docker: bool) -> None:
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        # `docker compose up -d` exits at once with status 0 while the container keeps running.
        if (status := process.poll()) is not None and not (docker and status == 0):
            raise UserError(f"the server ended with exit status {status}; the end of {log}:\n{_tail(log)}")
        if health(url, HEALTH_SECONDS) == 200:
            return
        time.sleep(0.5)
    raise UserError(f"{url}/health did not answer within {SECONDS} s; the end of {log}:\n{_tail(log)}")


def _tail(log: Path) -> str:
    lines: Sequence[str] = log.read_text(encoding="utf-8", errors="replace").splitlines()[-15:]
    return "\n".join(lines)


def _ask(url: str) -> str:
    headers = {"Content-Type": "application/json"}
    if key := os.environ.get("API_KEY"):
        headers["Authorization"] = f"Bearer {key}"
    body = {
        "model": "minimind",
        "messages": [{"role": "user", "content": QUESTION}],
        "max_tokens": 32,
        "temperature": 0,
    }
    asked = urllib.request.Request(f"{url}/v1/chat/completions", json.dumps(body).encode(), headers)
    try:
        with open_local(asked, timeout=120) as reply:
            return str(json.load(reply)["choices"][0]["message"]["content"])
    except OSError as error:
        raise UserError(f"{url}: the server does not answer a chat ({error})") from error
