"""What each process counts for Prometheus. Names and meanings are vLLM's with the prefix ``splitserve_``.

Owns the metrics; knows nothing of who measures. A registry is made once per process and passed around.
Invariant: every label value comes from a bounded set (models, roles, reasons), never from a client's text.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, GCCollector, Histogram, ProcessCollector

NAMESPACE = "splitserve"

# fmt: off
FIRST_TOKEN_BUCKETS = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640,
)
INTER_TOKEN_BUCKETS = (
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 10, 20, 40, 80,
)
REQUEST_BUCKETS = (
    0.05, 0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920,
)
QUEUE_BUCKETS = (0.001, 0.005, 0.01, 0.05, 0.1, 0.2, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 20, 30, 60, 120, 240)
TRANSFER_BUCKETS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30)
# fmt: on


def new_registry() -> CollectorRegistry:
    """A registry that also reports the process: memory, CPU time, file descriptors, garbage collections, tasks.

    It is to be read on the event loop."""
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    GCCollector(registry=registry)
    tasks = Gauge("asyncio_tasks", "Tasks of the event loop.", namespace=NAMESPACE, registry=registry)
    tasks.set_function(_count_tasks)
    return registry


def _count_tasks() -> int:
    try:
        return len(asyncio.all_tasks())
    except RuntimeError:  # not on an event loop
        return 0


class RouterMetrics:
    """What clients feel: times and tokens per model, as the router sees them. Times in seconds."""

    def __init__(self, registry: CollectorRegistry) -> None:
        model = ["model_name"]
        self._first_token = _histogram(
            registry, "time_to_first_token_seconds", "From arrival to the first token.", model, FIRST_TOKEN_BUCKETS
        )
        self._inter_token = _histogram(
            registry, "inter_token_latency_seconds", "Between two tokens.", model, INTER_TOKEN_BUCKETS
        )
        self._end_to_end = _histogram(
            registry, "e2e_request_latency_seconds", "From arrival to the last token.", model, REQUEST_BUCKETS
        )
        self._success = _counter(registry, "request_success", "Requests answered.", [*model, "finished_reason"])
        self._failures = _counter(
            registry, "request_failures", "Requests that ended in an error.", [*model, "error"]
        )
        self._retries = _counter(
            registry, "request_retries", "Legs of requests tried again on another worker.", [*model, "leg"]
        )
        self._retries_refused = _counter(
            registry, "request_retries_refused", "Requests that failed where no more could be tried again.", model
        )
        self._prompt_tokens = _counter(registry, "prompt_tokens", "Tokens of prompts.", model)
        self._generation_tokens = _counter(registry, "generation_tokens", "Tokens generated.", model)
        self._running = _gauge(registry, "router_requests_running", "Requests being answered.", model)

    def request_started(self, model: str) -> None:
        self._running.labels(model).inc()

    def request_ended(self, model: str) -> None:
        """Once for each ``request_started``, however it ended."""
        self._running.labels(model).dec()

    def observe_first_token(self, model: str, seconds: float) -> None:
        self._first_token.labels(model).observe(seconds)

    def observe_inter_token(self, model: str, seconds: float, tokens: int = 1) -> None:
        """``tokens`` arrived together, ``seconds`` after the one before: each took its share."""
        latency = self._inter_token.labels(model)
        for _ in range(tokens):
            latency.observe(seconds / tokens)

    def observe_success(
        self, model: str, finish_reason: str, seconds: float, prompt_tokens: int, generation_tokens: int
    ) -> None:
        """A request was answered, ``seconds`` after it arrived."""
        self._success.labels(model, finish_reason).inc()
        self._end_to_end.labels(model).observe(seconds)
        self._prompt_tokens.labels(model).inc(prompt_tokens)
        self._generation_tokens.labels(model).inc(generation_tokens)

    def observe_failure(self, model: str, error: str) -> None:
        """``model`` must be one that workers serve, or empty; ``error`` a class of ``splitserve.errors``."""
        self._failures.labels(model, error).inc()

    def observe_retry(self, model: str, leg: str) -> None:
        self._retries.labels(model, leg).inc()

    def observe_retry_refused(self, model: str) -> None:
        self._retries_refused.labels(model).inc()


class EngineMetrics:
    """What one worker's engine does."""

    def __init__(self, registry: CollectorRegistry, model: str, role: str) -> None:
        labels = {"model_name": model, "role": role}
        names = list(labels)
        self._queue_time = _histogram(
            registry, "request_queue_time_seconds", "From arrival to the first step.", names, QUEUE_BUCKETS
        ).labels(**labels)
        self._running = _gauge(registry, "num_requests_running", "Requests in the running batch.", names).labels(
            **labels
        )
        self._waiting = _gauge(registry, "num_requests_waiting", "Requests waiting to run.", names).labels(
            **labels
        )
        self._usage = _gauge(
            registry, "kv_cache_usage_perc", "KV blocks held by live requests; 1 is all of them.", names
        ).labels(**labels)
        self._queries = _counter(
            registry, "prefix_cache_queries", "Tokens looked up in the prefix cache.", names
        ).labels(**labels)
        self._hits = _counter(registry, "prefix_cache_hits", "Tokens found in the prefix cache.", names).labels(
            **labels
        )
        self._preemptions = _counter(registry, "num_preemptions", "Requests preempted.", names).labels(**labels)

    def observe_queue_time(self, seconds: float) -> None:
        self._queue_time.observe(seconds)

    def follow_load(self, read: Callable[[], tuple[int, int, float]]) -> None:
        """``read`` is asked whenever somebody looks: requests that run and that wait, KV usage from 0 to 1."""
        self._running.set_function(lambda: read()[0])
        self._waiting.set_function(lambda: read()[1])
        self._usage.set_function(lambda: read()[2])

    def add_prefix_lookup(self, queried_tokens: int, hit_tokens: int) -> None:
        self._queries.inc(queried_tokens)
        self._hits.inc(hit_tokens)

    def add_preemptions(self, count: int = 1) -> None:
        self._preemptions.inc(count)


class TransferMetrics:
    """What one worker pulls and publishes; has the shape of ``kvtransfer``'s observer."""

    def __init__(self, registry: CollectorRegistry, model: str, role: str) -> None:
        self._labels = {"model_name": model, "role": role}
        names = list(self._labels)
        self._seconds = _histogram(
            registry, "kv_transfer_seconds", "Pull of one sequence's blocks.", names, TRANSFER_BUCKETS
        ).labels(**self._labels)
        self._exposed = _histogram(
            registry,
            "kv_transfer_exposed_seconds",
            "From the end of a prompt's computation to its last block, verified and usable here.",
            names,
            TRANSFER_BUCKETS,
        ).labels(**self._labels)
        self._bytes = _counter(
            registry, "kv_transfer_bytes", "Verified bytes of KV pulled.", [*names, "transport"]
        )
        self._failures = _counter(registry, "kv_transfer_failures", "Pulls that failed.", [*names, "reason"])
        self._active = _gauge(registry, "kv_transfers_active", "Pulls under way.", names).labels(**self._labels)
        self._expired = _counter(
            registry, "kv_lease_expired", "Published transfers that nobody asked for in time.", names
        ).labels(**self._labels)

    def pull_started(self, transport: str) -> None:
        self._active.inc()

    def bytes_received(self, transport: str, count: int) -> None:
        self._bytes.labels(**self._labels, transport=transport).inc(count)

    def pull_finished(self, transport: str, seconds: float, exposed_seconds: float) -> None:
        self._active.dec()
        self._seconds.observe(seconds)
        self._exposed.observe(exposed_seconds)

    def pull_failed(self, transport: str, reason: str) -> None:
        self._active.dec()
        self._failures.labels(**self._labels, reason=reason).inc()

    def lease_expired(self) -> None:
        self._expired.inc()


# prometheus_client appends _total to the names of counters.
def _counter(registry: CollectorRegistry, name: str, text: str, labels: list[str]) -> Counter:
    return Counter(name, text, labels, namespace=NAMESPACE, registry=registry)


def _gauge(registry: CollectorRegistry, name: str, text: str, labels: list[str]) -> Gauge:
    return Gauge(name, text, labels, namespace=NAMESPACE, registry=registry)


def _histogram(
    registry: CollectorRegistry, name: str, text: str, labels: list[str], buckets: tuple[float, ...]
) -> Histogram:
    return Histogram(name, text, labels, namespace=NAMESPACE, registry=registry, buckets=buckets)
