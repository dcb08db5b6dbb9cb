"""Figures of a run as a terminal table and as a JSON file. Computes nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import orjson

from bench.load import LoadResult
from bench.metrics import inter_token_latencies
from splitserve.errors import ConfigError

_TITLES = {
    "ttft": "Time to First Token",
    "tpot": "Time per Output Token (excl. 1st token)",
    "itl": "Inter-Token Latency",
    "icl": "Inter-Arrival Latency (tokens that come together count once)",
    "e2el": "End-to-End Latency",
}
_WIDTH = 60
_NEVER_MIND_MS = 50.0  # a load that is sent this late is not the one that was asked for


def table(summary: Mapping[str, Any], metrics: Sequence[str], percentiles: Sequence[float]) -> str:
    """The report as lines of text."""
    rows: list[tuple[str, Any]] = [
        ("Successful requests", summary["completed"]),
        ("Failed requests", summary["failed"]),
        ("Benchmark duration (s)", summary["duration"]),
        ("Total input tokens", summary["total_input_tokens"]),
        ("  of which cached at the server", summary["total_cached_tokens"]),
        ("Total generated tokens", summary["total_output_tokens"]),
        ("Request throughput (req/s)", summary["request_throughput"]),
        ("Output token throughput (tok/s)", summary["output_throughput"]),
        ("Peak output token throughput (tok/s)", summary["max_output_tokens_per_s"]),
        ("Total token throughput (tok/s)", summary["total_token_throughput"]),
        ("Peak concurrent requests", summary["max_concurrent_requests"]),
        ("Client CPU (cores)", summary["client_cpu_fraction"]),
    ]
    if summary["request_goodput"] is not None:
        rows.append(("Request goodput (req/s)", summary["request_goodput"]))
        rows.append(("Attainment of the limits (fraction)", summary["slo_attainment"]))
    lines = [" Serving Benchmark Result ".center(_WIDTH, "=")]
    lines += [_row(*row) for row in rows]
    for metric in metrics:
        lines.append(_TITLES[metric].center(_WIDTH, "-"))
        names = [("Mean", "mean"), ("Median", "median")]
        names += [(f"P{percentile:g}", f"p{percentile:g}") for percentile in percentiles if percentile != 50]
        lines += [_row(f"{title} {metric.upper()} (ms)", summary[f"{key}_{metric}_ms"]) for title, key in names]
    lines.append("=" * _WIDTH)
    return "\n".join(lines + list(_notes(summary)))


def _row(title: str, value: float | None) -> str:
    number = "none" if value is None else f"{value:d}" if isinstance(value, int) else f"{value:.2f}"
    return f"{title + ':':<42}{number:>{_WIDTH - 42}}"


def _notes(summary: Mapping[str, Any]) -> list[str]:
    notes = [f"failed {count} times: {reason}" for reason, count in summary["failures"].items()]
    if summary["uncounted"]:
        notes.append(
            f"{summary['uncounted']} answers came without a count of tokens per event: "
            "one was assumed, and their ITL is that of events"
        )
    if summary["max_concurrency"] is None and summary["max_send_lag_ms"] > _NEVER_MIND_MS:
        notes.append(
            f"requests were sent up to {summary['max_send_lag_ms']:.0f} ms late "
            f"({summary['mean_send_lag_ms']:.0f} ms on average): the client lacked CPU"
        )
    return notes


def details(result: LoadResult) -> dict[str, Any]:
    """Of each request, in order of sending; seconds."""
    records = result.records
    return {
        "start_times": [record.sent - result.began for record in records],
        "input_lens": [record.prompt_tokens for record in records],
        "output_lens": [record.output_tokens for record in records],
        "cached_lens": [record.cached_tokens for record in records],
        "labels": [record.label for record in records],
        "ttfts": [record.ttft if record.arrivals else None for record in records],
        "itls": [inter_token_latencies(record) for record in records],
        "errors": [record.error or "" for record in records],
    }


def save(path: Path, data: Mapping[str, Any]) -> None:
    """Writes JSON. Raises ConfigError."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(orjson.dumps(data, option=orjson.OPT_INDENT_2 | orjson.OPT_SERIALIZE_NUMPY) + b"\n")
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}") from error
