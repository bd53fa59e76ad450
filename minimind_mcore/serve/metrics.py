"""What `/metrics` tells Prometheus."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest  # pyright: ignore[reportMissingImports]

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1)


class ServerMetrics:
    """Counters of one server, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        registry = self.registry
        self._requests = Counter(
            "minimind_requests", "HTTP requests by route and status", ["route", "status"], registry=registry
        )
        self._running = Gauge("minimind_requests_running", "answers that are being written", registry=registry)
        self._waiting = Gauge("minimind_requests_waiting", "answers that wait for a place", registry=registry)
        self._prompt = Counter("minimind_prompt_tokens", "tokens of prompts", registry=registry)
        self._cached = Counter("minimind_prompt_tokens_cached", "of these, kept from before", registry=registry)
        self._tokens = Counter("minimind_generation_tokens", "tokens of answers", registry=registry)
        self._first = Histogram(
            "minimind_time_to_first_token_seconds",
            "from a request to its first token",
            buckets=_SECONDS,
            registry=registry,
        )
        self._latency = Histogram(
            "minimind_request_latency_seconds", "from a request to its last token", buckets=_SECONDS, registry=registry
        )
        self._per_token = Histogram(
            "minimind_time_per_output_token_seconds", "between two tokens", buckets=_TOKEN_SECONDS, registry=registry
        )

    def request(self, route: str, status: int) -> None:
        """Count an HTTP request."""
        self._requests.labels(route, str(status)).inc()

    def batch(self, running: int, waiting: int) -> None:
        """Set how many answers run and wait."""
        self._running.set(running)
        self._waiting.set(waiting)

    def prompt(self, tokens: int, cached: int) -> None:
        """Count the tokens of a prompt."""
        self._prompt.inc(tokens)
        self._cached.inc(cached)

    def tokens(self, count: int) -> None:
        """Count tokens of answers."""
        self._tokens.inc(count)

    def first_token(self, seconds: float) -> None:
        """Observe the time to a first token."""
        self._first.observe(seconds)

    def finished(self, tokens: int, latency: float, since_first: float) -> None:
        """Observe an answer that has ended."""
        self._latency.observe(latency)
        if tokens > 1:
            self._per_token.observe(since_first / (tokens - 1))

    def text(self) -> bytes:
        """Everything, in Prometheus' text format."""
        return bytes(generate_latest(self.registry))
