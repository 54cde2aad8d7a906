"""Prometheus metrics. Each application has its own registry, so that several can run in one process."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

from babydoctor.serve.connections import ConnectionLimits
from babydoctor.serve.settings import Limits

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_LATENCY_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_PER_TOKEN_S = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64)


class HttpMetrics:
    """Requests by route and status, on every application."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self._requests = Counter("babydoctor_requests", "HTTP requests", ["route", "status"], registry=self.registry)
        self._duration = Histogram(
            "babydoctor_request_seconds", "Time to the last byte", ["route"], buckets=_LATENCY_S, registry=self.registry
        )

        self._connections_ended = Counter(
            "babydoctor_connections_ended", "Connections that the server ended", ["reason"], registry=self.registry
        )

    def connections(self, limits: Limits) -> ConnectionLimits:
        """The limits of a server's connections, counted here."""
        found = ConnectionLimits(
            limits.max_connections,
            limits.head_timeout_s,
            limits.stall_timeout_s,
            lambda reason: self._connections_ended.labels(reason).inc(),
        )
        self.gauge("connections", "Connections that are open", lambda: len(found.open))
        return found

    def observe(self, route: str, status: int, duration_s: float) -> None:
        self._requests.labels(route, str(status)).inc()
        self._duration.labels(route).observe(duration_s)

    def gauge(self, name: str, text: str, read: Callable[[], float]) -> None:
        """A value that is read at each scrape."""
        Gauge(f"babydoctor_{name}", text, registry=self.registry).set_function(read)

    def render(self) -> bytes:
        return generate_latest(self.registry)


class WorkerMetrics(HttpMetrics):
    """Latencies and token counts of a worker."""

    def __init__(self) -> None:
        super().__init__()
        self.prompt_tokens = Counter("babydoctor_prompt_tokens", "Tokens of prompts", registry=self.registry)
        self.generated_tokens = Counter("babydoctor_generated_tokens", "Tokens generated", registry=self.registry)
        self.finished = Counter("babydoctor_answers", "Answers by how they ended", ["reason"], registry=self.registry)
        self.first_token = Histogram(
            "babydoctor_first_token_seconds",
            "From arrival to the first token",
            buckets=_LATENCY_S,
            registry=self.registry,
        )
        self.per_token = Histogram(
            "babydoctor_per_token_seconds",
            "Between tokens, mean of an answer",
            buckets=_PER_TOKEN_S,
            registry=self.registry,
        )


class ControllerMetrics(HttpMetrics):
    """Failures that a controller handled."""

    def __init__(self) -> None:
        super().__init__()
        self.failovers = Counter(
            "babydoctor_failovers", "Answers that were continued on another worker", registry=self.registry
        )
        self.quarantined = Counter(
            "babydoctor_quarantined",
            "Requests that lost their worker and were not offered again",
            registry=self.registry,
        )
        self.failed_connections = Counter(
            "babydoctor_failed_connections", "Connections to workers that failed", registry=self.registry
        )
