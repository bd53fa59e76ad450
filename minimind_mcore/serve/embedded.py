"""The embedded server: this kit's own decoder behind FastAPI and uvicorn."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import importlib.util
import logging
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType

from minimind_mcore import log
from minimind_mcore.checkpoint.source import Source
from minimind_mcore.errors import UserError
from minimind_mcore.hosts import in_url
from minimind_mcore.inference.loading import Loaded, start
from minimind_mcore.paths import install_command
from minimind_mcore.platform import device
from minimind_mcore.preprocess.tokenize import TokenizerInfo
from minimind_mcore.serve.engines import ServerOptions

NEEDED = ("fastapi", "uvicorn", "sse_starlette", "prometheus_client", "llguidance")
DRAIN_SECONDS = 30  # that running answers get when the server ends
SHARE = 0.2  # of the device's memory, for keys and values


def problem(source: Source) -> str | None:
    """Why the embedded server cannot run; None if it can."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        return f"{', '.join(missing)} not installed: {install_command('serve')}"
    return None


def run(source: Source, info: TokenizerInfo, options: ServerOptions) -> int:
    """Serve until SIGINT or SIGTERM; running answers are finished first.

    Raises:
        UserError: a package is missing, the address cannot be used, or the weights are damaged.
    """
    if reason := problem(source):
        raise UserError(reason)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)
    # The event loop and the scheduler's thread share an interpreter: at 5 ms each step would wait for the other one.
    sys.setswitchinterval(0.0005)
    with listening(options.host, options.port) as listener, contextlib.suppress(KeyboardInterrupt):
        # The log of requests has the time, as uvicorn's messages have.
        asyncio.run(EmbeddedServer(source, info, options).run(listener, log.hand_over))
    print("the server has ended", file=sys.stderr, flush=True)
    return 0


@contextlib.contextmanager
def listening(host: str, port: int) -> Iterator[socket.socket]:
    """Open a socket that listens at an address.

    Raises:
        UserError: the address is not this host's, or its port is in use.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise UserError(f"--host {host}: {error.strerror}; give an address of this host") from error
    with socket.socket(family, kind, protocol) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(address)
            listener.listen(2048)
        except OSError as error:
            raise UserError(f"--host {host} --port {port}: {error.strerror}; give another --port or --host") from error
        yield listener


def key_value_budget(loaded: Loaded, gib: float | None, max_model_len: int) -> int:
    """Positions of keys and values that memory is used for; one sequence always has room."""
    config = loaded.config
    width = 2 * config.num_layers * config.num_kv_heads * loaded.decoder.head_dim * loaded.decoder.weight.element_size()
    memory = gib * 2**30 if gib else device.current().memory * SHARE
    return max(int(memory / width), max_model_len + 1)


class EmbeddedServer:
    """One server, which `run` drives.

    Args:
        source: the model, not yet read.
        info: its tokenizer.
        options: of the server.
    """

    def __init__(self, source: Source, info: TokenizerInfo, options: ServerOptions) -> None:
        import uvicorn  # pyright: ignore[reportMissingImports]
        from sse_starlette.sse import AppStatus  # pyright: ignore[reportMissingImports]

        from minimind_mcore.serve.api import create_app
        from minimind_mcore.serve.http_protocol import LimitedHeads
        from minimind_mcore.serve.service import Service

        AppStatus.enable_automatic_graceful_drain = False  # it would cut streams at the signal
        logging.getLogger("uvicorn.error").setLevel(logging.WARNING)
        self.source, self.info, self.options = source, info, options
        self.service = Service(options)
        config = uvicorn.Config(
            create_app(self.service),
            log_config=None, access_log=False, server_header=False, lifespan="off", ws="none", http=LimitedHeads,
            timeout_graceful_shutdown=DRAIN_SECONDS, timeout_keep_alive=30,
        )  # fmt: skip
        self.server = uvicorn.Server(config)

    def stop(self) -> None:
        """Finish the running answers and end; may be called from any thread."""
        self.server.should_exit = True

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        """End; a second Ctrl-C does not wait for the running answers."""
        self.server.force_exit = self.server.should_exit and number == signal.SIGINT
        self.stop()

    async def run(self, listener: socket.socket, when_loaded: Callable[[], None] = lambda: None) -> None:
        """Answer at a socket until `stop`, or a signal; /health says when the model is loaded.

        Raises:
            UserError: the weights are damaged.
        """
        serving = asyncio.ensure_future(self.server.serve(sockets=[listener]))
        try:
            loop = asyncio.get_running_loop()
            # In a thread that ends. A thread that lives on would keep its OpenMP threads; as soon as a process has more
            # of them than cores, libgomp puts them to sleep after each operation, and a step takes 1.5 times as long.
            with concurrent.futures.ThreadPoolExecutor(1) as loader:
                await loop.run_in_executor(loader, self._load, loop)
            when_loaded()
            if threading.current_thread() is threading.main_thread():
                for number in (signal.SIGINT, signal.SIGTERM):  # uvicorn would send the signal on when it has ended
                    signal.signal(number, self._on_signal)
            host, port = listener.getsockname()[:2]
            address = f"http://{in_url(host)}:{port}"
            print(f"chat page  {address}/", file=sys.stderr, flush=True)
            print(f"serving    {address}/v1 as {self.options.name}", file=sys.stderr, flush=True)
        except BaseException:
            self.stop()
            raise
        finally:
            await serving
            self.service.close()

    def _load(self, loop: asyncio.AbstractEventLoop) -> None:
        from minimind_mcore.serve.scheduler import Scheduler
        from minimind_mcore.serve.service import Outbox

        options, loaded = self.options, start(self.source, self.info)
        positions = loaded.config.max_position_embeddings
        length = min(options.max_model_len or positions, positions)
        budget = key_value_budget(loaded, options.kv_cache_gib, length)
        outbox, metrics = Outbox(loop), self.service.metrics
        scheduler = Scheduler(loaded, options.max_batch_size, options.max_queue, budget, metrics, outbox.flush)
        self.service.start(loaded, scheduler, outbox, length)
