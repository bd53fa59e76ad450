"""minimind-mcore manager: start, watch and stop jobs of every stage in a browser.

    minimind-mcore manager
    minimind-mcore manager --allow /data --allow /models --port 8999

Settings: TOKEN (what clients send; default: a new one at each start), PORT, DATA_DIR, OUTPUT_DIR. The address that is
printed has the token. Jobs go on when the manager ends, and the next manager finds them again.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import importlib.util
import logging
import os
import secrets
import signal
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from minimind_mcore import log
from minimind_mcore.cli.settings import data_dir, env
from minimind_mcore.errors import UserError
from minimind_mcore.hosts import in_url
from minimind_mcore.inputs.flags import documented_parser
from minimind_mcore.paths import default_outputs, install_command

if TYPE_CHECKING:
    from minimind_mcore.manager.queue import Queue

PORT = 8999  # the port of minimind-ascend's manager
NEEDED = ("fastapi", "uvicorn", "sse_starlette", "httptools")
CLOSE_SECONDS = 3  # time for event streams to close when the manager ends


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    found = documented_parser("minimind-mcore manager", __doc__)
    found.add_argument("--host", default="127.0.0.1", help="address to listen at (default: this host alone)")
    found.add_argument("--port", type=int, help="port to listen at (default: PORT, else 8999)")
    found.add_argument("--token", default="", help="like TOKEN, but other users of the host can read flags")
    found.add_argument(
        "--jobs", default="", metavar="DIRECTORY", help="jobs' directory (default: OUTPUT_DIR, else outputs/manager)"
    )
    found.add_argument(
        "--allow", action="append", default=[], metavar="DIRECTORY",
        help="jobs may read data, weights and tokenizers there; may be given again (always: dataset, data, outputs)",
    )  # fmt: skip
    found.add_argument(
        "--trust-reward-models", action="store_true",
        help="jobs may use reward models: Python code in their directories is run with your rights",
    )  # fmt: skip
    found.add_argument("--cpu-slots", type=int, default=1, help="jobs that may run on the CPU at once (default: 1)")
    found.add_argument(
        "--stop-seconds", type=float, default=600, help="time for a job to save before it is killed (default: 600)"
    )
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until SIGINT or SIGTERM. Return the exit status.

    Raises:
        UserError: a flag is wrong, a package is missing, or the address or the directory is in use.
    """
    args = parser().parse_args(argv)
    if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        raise UserError(f"{', '.join(missing)} not installed: {install_command('serve')}")
    port = args.port if args.port is not None else int(env("PORT", str(PORT)))
    if not 0 <= port < 65536:
        raise UserError(f"--port {port}: expected 0 to 65535; 0 takes a free port")
    if args.cpu_slots < 1 or not args.stop_seconds > 0:
        raise UserError("--cpu-slots: expected 1 or more; --stop-seconds: expected more than 0")
    token = args.token or env("TOKEN") or secrets.token_urlsafe(24)
    if not (token.isascii() and all(letter.isalnum() or letter in "-._~" for letter in token)):
        raise UserError("TOKEN (--token): expected only letters, digits and - . _ ~, because it is part of an address")
    from minimind_mcore.manager.files import Directories
    from minimind_mcore.manager.queue import DROPPED, Hardware, Queue
    from minimind_mcore.serve.embedded import listening

    root = default_outputs()
    jobs = Path(args.jobs or env("OUTPUT_DIR", str(root / "outputs/manager"))).absolute()
    data = Path(env("DATA_DIR", str(root / "dataset"))).absolute()
    allowed = [Path(folder).absolute() for folder in args.allow]
    if absent := [str(folder) for folder in allowed if not folder.is_dir()]:
        raise UserError(f"--allow {absent[0]}: there is no such directory")
    readable = dict.fromkeys((jobs, data, data_dir(), root / "outputs", *allowed))
    directories = Directories(jobs, data, tuple(readable), args.trust_reward_models)
    queue = Queue(directories, Hardware.find(args.cpu_slots), args.stop_seconds)
    for name in DROPPED - {"DATA_DIR", "DEVICE"}:  # functions of stages read some of them, such as TRAIN_ITERS
        os.environ.pop(name, None)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)
    log.hand_over()
    with contextlib.closing(queue), listening(args.host, port) as listener:
        address = f"http://{in_url(args.host)}:{listener.getsockname()[1]}"
        print(f"manager    {address}/#token={token}", file=sys.stderr, flush=True)
        asyncio.run(serve(queue, token, listener))
    return 0


async def serve(queue: Queue, token: str, listener: socket.socket) -> None:
    """Serve on a socket until a signal. The signal also ends event streams and a running dry run."""
    import uvicorn  # pyright: ignore[reportMissingImports]
    from sse_starlette.sse import AppStatus  # pyright: ignore[reportMissingImports]

    from minimind_mcore.manager.api import create_app
    from minimind_mcore.manager.plan import Planner
    from minimind_mcore.serve.http_protocol import LimitedHeads

    planner = Planner(queue)
    config = uvicorn.Config(
        create_app(planner, token), log_config=None, access_log=False, server_header=False, lifespan="off", ws="none",
        http=LimitedHeads, timeout_graceful_shutdown=CLOSE_SECONDS, timeout_keep_alive=30,
    )  # fmt: skip
    server = uvicorn.Server(config)

    def end(number: int, frame: FrameType | None) -> None:
        server.force_exit = server.should_exit and number == signal.SIGINT
        server.should_exit = AppStatus.should_exit = True

    serving = asyncio.ensure_future(server.serve(sockets=[listener]))
    await asyncio.sleep(0)  # let uvicorn set its handlers first: they would raise the signal again at the end
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, end)
    try:
        await serving
    finally:
        planner.close()
