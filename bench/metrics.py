"""From records to the figures of a run, under the names that ``vllm bench serve`` gives them.

Times are in milliseconds here. What counts:

- TTFT: from sending to the first token. E2EL: to the last. TPOT: (E2EL - TTFT) / (tokens - 1), of answers that
  have more than one token.
- ITL counts tokens: k tokens that arrive together, t after those before them, are k intervals of t / k; the tokens
  that come along with the first one are intervals of 0. So the intervals of an answer number its tokens less one
  and add up to E2EL - TTFT.
- ICL is the time between arrivals, however many tokens they carry, so that a server can't hide a pause by
  sending much at once after it. ``vllm bench serve`` calls this one ITL.
- Failed requests have no times. They count in ``failed``, and as misses in ``slo_attainment`` and goodput.
- A figure of no requests is null, not 0.

Invariant: ``completed + failed`` is the number of records.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np

from bench.load import LoadResult
from bench.record import Record
from splitserve.errors import ConfigError

METRICS = ("ttft", "tpot", "itl", "icl", "e2el")
SLO_METRICS = ("ttft", "tpot", "e2el")


@dataclass(frozen=True, slots=True)
class Slo:
    """Limits that one request must keep, in milliseconds by metric."""

    limits: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def parse(cls, parts: Sequence[str]) -> Slo:
        """From ``ttft:2500``. Raises ConfigError."""
        limits = {}
        for part in parts:
            name, _, value = part.partition(":")
            try:
                limits[name] = float(value)
            except ValueError:
                limits[name] = 0.0
            if name not in SLO_METRICS or not limits[name] > 0:
                raise ConfigError(f"{part!r} is not a limit such as ttft:2500, of one of {', '.join(SLO_METRICS)}")
        return cls(limits)

    def kept(self, record: Record) -> bool:
        """Whether a request succeeded within all limits."""
        if record.error is not None:
            return False
        values = {"ttft": record.ttft, "tpot": record.tpot, "e2el": record.e2el}
        return all(values[name] * 1e3 <= limit for name, limit in self.limits.items())


def inter_token_latencies(record: Record) -> list[float]:
    """Seconds before each token after the first."""
    intervals: list[float] = []
    last = record.sent
    for index, arrival in enumerate(record.arrivals):
        if index:
            intervals += [(arrival.time - last) / arrival.tokens] * arrival.tokens
        else:
            intervals += [0.0] * (arrival.tokens - 1)
        last = arrival.time
    return intervals


def inter_arrival_latencies(record: Record) -> list[float]:
    """Seconds between arrivals."""
    times = [arrival.time for arrival in record.arrivals]
    return [after - before for before, after in pairwise(times)]


def samples(records: Sequence[Record], metric: str) -> list[float]:
    """Values of one of ``METRICS`` in milliseconds, of the requests that succeeded."""
    good = [record for record in records if record.error is None]
    match metric:
        case "ttft":
            values = [record.ttft for record in good]
        case "e2el":
            values = [record.e2el for record in good]
        case "tpot":
            values = [record.tpot for record in good if record.output_tokens > 1]
        case "itl":
            values = [value for record in good for value in inter_token_latencies(record)]
        case "icl":
            values = [value for record in good for value in inter_arrival_latencies(record)]
        case _:
            raise ValueError(metric)
    return [value * 1e3 for value in values]


def summarize(
    result: LoadResult, slo: Slo, metrics: Sequence[str] = METRICS, percentiles: Sequence[float] = (50, 90, 99)
) -> dict[str, Any]:
    """All figures of a run, ready for JSON."""
    records = result.records
    good = [record for record in records if record.error is None]
    seconds = max(result.duration, 1e-9)
    total_in = sum(record.prompt_tokens for record in good)
    total_out = sum(record.output_tokens for record in good)
    kept = sum(slo.kept(record) for record in records)
    lags = [max(0.0, record.sent - record.scheduled) * 1e3 for record in records]
    summary: dict[str, Any] = {
        "duration": result.duration,
        "completed": len(good),
        "failed": len(records) - len(good),
        "total_input_tokens": total_in,
        "total_output_tokens": total_out,
        "total_cached_tokens": sum(record.cached_tokens for record in good),
        "request_throughput": len(good) / seconds,
        "request_goodput": kept / seconds if slo.limits else None,
        "slo_attainment": kept / len(records) if slo.limits and records else None,
        "output_throughput": total_out / seconds,
        "total_token_throughput": (total_in + total_out) / seconds,
        "max_output_tokens_per_s": _peak_tokens(good),
        "max_concurrent_requests": _peak_running(records),
        "uncounted": sum(not record.counted for record in good),
        "mean_send_lag_ms": float(np.mean(lags)) if lags else 0.0,
        "max_send_lag_ms": max(lags, default=0.0),
        "client_cpu_seconds": result.client_cpu,
        "client_cpu_fraction": result.client_cpu / seconds,
        "failures": _failures(records),
    }
    for metric in metrics:
        summary |= _statistics(metric, samples(records, metric), percentiles)
    return summary


def _statistics(metric: str, values: Sequence[float], percentiles: Sequence[float]) -> dict[str, float | None]:
    if not values:
        names = ["mean", "median", "std", "max", *(f"p{percentile:g}" for percentile in percentiles)]
        return {f"{name}_{metric}_ms": None for name in names}
    data = np.asarray(values)
    return {
        f"mean_{metric}_ms": float(data.mean()),
        f"median_{metric}_ms": float(np.median(data)),
        f"std_{metric}_ms": float(data.std()),
        f"max_{metric}_ms": float(data.max()),
        **{f"p{percentile:g}_{metric}_ms": float(np.percentile(data, percentile)) for percentile in percentiles},
    }


def _failures(records: Sequence[Record]) -> dict[str, int]:
    """How often each reason occurred, the most frequent first."""
    counts: dict[str, int] = {}
    for record in records:
        if record.error is not None:
            counts[record.error] = counts.get(record.error, 0) + 1
    return dict(sorted(counts.items(), key=lambda item: -item[1]))


def _peak_tokens(records: Sequence[Record]) -> float:
    """Most tokens that arrived within one second of the clock."""
    seconds: dict[int, int] = {}
    for record in records:
        for arrival in record.arrivals:
            second = int(arrival.time)
            seconds[second] = seconds.get(second, 0) + arrival.tokens
    return float(max(seconds.values(), default=0))


def _peak_running(records: Sequence[Record]) -> int:
    running = peak = 0
    edges = [(record.sent, 1) for record in records] + [(record.ended, -1) for record in records]
    for _, change in sorted(edges):
        running += change
        peak = max(peak, running)
    return peak
