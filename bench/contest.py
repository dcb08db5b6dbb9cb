"""One server through the workloads of the comparison. Knows no other server and no report.

Invariant: each workload gets prompts that no server has seen, so no prefix cache helps anyone.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import uvloop

from bench.arrivals import Arrivals
from bench.datasets import Lengths, Tokens
from bench.goodput import Verdict, highest
from bench.http_client import Server
from bench.load import Client, LoadResult, run_load
from bench.metrics import Slo, summarize
from bench.openai_api import Api
from bench.peers import Peer
from bench.record import Record
from bench.rounds import Say
from bench.servers import RunningServer
from bench.workloads import (
    GOODPUT_ATTAINMENT,
    GOODPUT_FIRST,
    GOODPUT_LEAST,
    GOODPUT_LENGTHS,
    GOODPUT_RATES,
    GOODPUT_SECONDS,
    GOODPUT_SLO,
    WORKLOADS,
    Workload,
)

VOCAB = 32_000
_IDLE_SECONDS = 20.0
_REST_SECONDS = 15.0  # behind a start, which leaves work for the seconds after it
_SETTLE_SECONDS = 2.0


@dataclass(frozen=True, slots=True)
class Contest:
    """A running server and how much to ask of it; ``scale`` multiplies the numbers of requests."""

    peer: Peer
    server: RunningServer
    scale: float
    say: Say

    def warm_up(self) -> None:
        """Requests of the sizes to come, so that nothing is compiled or allocated in a measurement."""
        for lengths in (Lengths(16, 4), Lengths(1024, 4), Lengths(512, 16)):
            self._load(Workload("warm-up", lengths, 2, concurrency=2), 2)

    def measure(self, name: str, goodput: float | None) -> dict[str, Any]:
        """Figures of one of ``ORDER``; ``goodput``: the rate that an earlier round found. Raises ConfigError."""
        match name:
            case "start":
                return {"seconds": self.server.ready_seconds}
            case "idle":
                return self.idle()
            case "goodput":
                return self.goodput(goodput)
            case _:
                return self.run(next(workload for workload in WORKLOADS if workload.name == name))

    def run(self, workload: Workload) -> dict[str, Any]:
        """Figures under vLLM's names, and the intervals between tokens with their times."""
        result = self._load(workload, self._count(workload.count))
        summary = summarize(result, Slo())
        shown = {"TTFT": "mean_ttft_ms", "TPOT": "mean_tpot_ms", "ITL p99": "p99_itl_ms"}
        parts = [f"{title} {summary[key]:.1f} ms" for title, key in shown.items() if summary[key] is not None]
        parts = [f"{summary['request_throughput']:.2f} req/s", *parts, f"{summary['failed']} failed"]
        self.say(f"  {workload.title}: {', '.join(parts)}")
        return summary | {"gaps": _gaps(result)}

    def goodput(self, first: float | None) -> dict[str, Any]:
        """The highest rate at which enough requests keep the limits, and what came of each rate tried.

        ``first``: the rate to begin with, from an earlier round. A window that can't pass any more is ended.
        """
        tried: list[dict[str, Any]] = []

        def passes(rate: float) -> bool:
            count = self._count(max(GOODPUT_LEAST, round(rate * GOODPUT_SECONDS)))
            verdict = Verdict(GOODPUT_SLO, count, GOODPUT_ATTAINMENT)
            result = self._load(Workload("goodput", GOODPUT_LENGTHS, count, rate=rate), count, verdict.lost)
            ended = len(result.records) < count
            tried.append({"rate": rate, "requests": count, "attainment": verdict.attainment, "ended_early": ended})
            self.say(f"  {rate:g} req/s: {'at most ' if ended else ''}{verdict.attainment:.0%} within the limits")
            time.sleep(_SETTLE_SECONDS)
            return verdict.passed

        begin = GOODPUT_RATES.index(first) if first in GOODPUT_RATES else GOODPUT_FIRST
        best = highest(GOODPUT_RATES, passes, begin)
        return {"rate": 0.0 if best is None else GOODPUT_RATES[best], "tried": tried}

    def idle(self) -> dict[str, Any]:
        """CPU time of all its processes while nobody asks, in cores, and the memory they hold."""
        time.sleep(_REST_SECONDS)
        before, began = self.server.weigh(), time.perf_counter()
        time.sleep(_IDLE_SECONDS)
        after = self.server.weigh()
        cores = (after.cpu_seconds - before.cpu_seconds) / (time.perf_counter() - began)
        resident = sum(after.resident.values()) / 2**20
        self.say(f"  idle: {cores:.3f} cores, {resident:.0f} MiB resident")
        return {"cpu_fraction": cores, "resident_mib": resident, "processes": dict(after.resident)}

    def _count(self, requests: int) -> int:
        return max(2, round(requests * self.scale * self.peer.prompts))

    def _load(self, workload: Workload, count: int, enough: Callable[[Record], bool] | None = None) -> LoadResult:
        rng = np.random.default_rng(secrets.randbits(64))
        conversations = workload.conversations(Tokens(rng, VOCAB), count)
        offsets = Arrivals(workload.rate).offsets(count, rng)
        api = Api(
            self.peer.model, prompt_form=self.peer.prompt_form, ignore_eos=True, extra_body=self.peer.extra_body
        )
        client = Client(Server.parse(self.server.spec.url), api, self.peer.request_timeout)
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(run_load(client, conversations, offsets, workload.concurrency, enough))


def _gaps(result: LoadResult) -> dict[str, list[float]]:
    """When each later arrival came (seconds into the run), and how long after the one before (ms); by label."""
    gaps: dict[str, list[float]] = {"time": [], "gap_ms": [], "long_prompts": []}
    for record in result.records:
        times = [arrival.time for arrival in record.arrivals]
        if record.label == "long":
            gaps["long_prompts"].append(round(record.sent - result.began, 4))
            continue
        gaps["time"] += [round(now - result.began, 4) for now in times[1:]]
        gaps["gap_ms"] += [round((now - last) * 1e3, 3) for last, now in pairwise(times)]
    return gaps
