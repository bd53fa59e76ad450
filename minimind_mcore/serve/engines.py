"""Choose the program that answers requests: the embedded server, or vLLM.

An engine is a module of this package with two functions:

    problem(source: Source) -> str | None             why the engine cannot serve this model here; None if it can
    run(source: Source, info: TokenizerInfo, options: ServerOptions) -> int    serve until a signal; the exit status

An engine's module is imported only when it is requested, or when the choice depends on it.
"""

from __future__ import annotations

import importlib
import ipaddress
from dataclasses import dataclass
from types import ModuleType

from minimind_mcore.checkpoint.source import Source
from minimind_mcore.errors import UserError
from minimind_mcore.platform import device


@dataclass(frozen=True, kw_only=True)
class ServerOptions:
    """Settings of a server.

    Attributes:
        host, port: address to listen on.
        name: value of `model` in requests and replies; "minimind" is always accepted too.
        api_key: bearer token that requests must have. None: no key is required.
        raw: the model is a base model. The server refuses chats and puts BOS before a prompt.
        thinking: default for chats that do not set it. None: as in the chat template.
        max_model_len: maximum tokens of a prompt and its answer. None: the model's maximum position.
        max_batch_size: maximum number of running requests.
        max_queue: maximum number of waiting requests.
        kv_cache_gib: memory for keys and values. None: the engine's default.
        defaults: sampling parameters of requests that do not set them: temperature, top_p, top_k, ...
        cors_origins: web pages that may send requests.
    """

    host: str
    port: int
    name: str
    api_key: str | None = None
    raw: bool = False
    thinking: bool | None = None
    max_model_len: int | None = None
    max_batch_size: int = 32
    max_queue: int = 256
    kv_cache_gib: float | None = None
    defaults: tuple[tuple[str, float], ...] = ()
    cors_origins: tuple[str, ...] = ()

    @property
    def is_anonymous(self) -> bool:
        """Whether other hosts are served without a key."""
        return self.api_key is None and not is_loopback(self.host)


def engine(name: str) -> ModuleType:
    """Return the module of an engine."""
    return importlib.import_module(f"minimind_mcore.serve.{name}")


def choose(asked: str, source: Source) -> tuple[str, str]:
    """Return the engine that serves a model, and the reason.

    Args:
        asked: "embedded", "vllm" or "auto". "auto" selects vLLM if it is installed and supports the model's shape,
            except on an NPU, where vLLM's attention operator supports few head sizes.
        source: the model.

    Raises:
        UserError: the requested engine cannot serve the model.
    """
    if asked == "auto":
        if device.current().is_ascend:
            return "embedded", "the default on an NPU; ENGINE=vllm selects vLLM"
        problem = engine("vllm").problem(source)
        return ("embedded", problem) if problem else ("vllm", "vLLM is installed and supports this model")
    if problem := engine(asked).problem(source):
        raise UserError(f"ENGINE={asked}: {problem}. ENGINE=embedded needs no vLLM and supports every head size")
    return asked, f"ENGINE={asked}"


def is_loopback(host: str) -> bool:
    """Return whether an address is reachable from this host only."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
