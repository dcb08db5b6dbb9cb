"""What the comparison measures, and how much better we mean to be. Plain data.

Invariant: a workload is the same for every server: lengths, arrivals and number of requests; only seeds differ.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from bench.datasets import Conversation, Lengths, Tokens, mixed, random_prompts
from bench.metrics import Slo


@dataclass(frozen=True, slots=True)
class Workload:
    """A load on a server. ``long``: prompts that fall among the others, ``long_share`` of all.

    ``once``: shown as a picture, not as a figure, so only the last round has it.
    """

    name: str
    lengths: Lengths
    count: int
    rate: float = math.inf  # a second, Poisson
    concurrency: int | None = None
    long: Lengths | None = None
    long_share: float = 0.0
    once: bool = False

    @property
    def title(self) -> str:
        sizes = f"{self.lengths.input} in / {self.lengths.output} out"
        if self.long is not None:
            sizes += f" and {self.long_share:.0%} of {self.long.input} in / {self.long.output} out"
        if not math.isinf(self.rate):
            return f"{sizes}, Poisson {self.rate:g} req/s"
        return f"{sizes}, one at a time" if self.concurrency == 1 else f"{sizes}, {self.concurrency} at a time"

    def conversations(self, tokens: Tokens, count: int) -> list[Conversation]:
        if self.long is not None:
            return mixed(tokens, count, self.lengths, self.long, self.long_share)
        return random_prompts(tokens, count, self.lengths)


@dataclass(frozen=True, slots=True)
class Target:
    """Our figure, divided by the peer's, is to be at most (or at least) ``ratio``; without a peer, itself."""

    workload: str
    metric: str
    peer: str | None
    ratio: float
    at_least: bool = False

    def met(self, ratio: float) -> bool:
        return ratio >= self.ratio if self.at_least else ratio <= self.ratio


SHORT, MIDDLE, LONG = Lengths(128, 64), Lengths(512, 64), Lengths(1024, 128)

WORKLOADS = (
    Workload("single", SHORT, 10, concurrency=1),
    Workload("decode-16", Lengths(32, 128), 48, concurrency=16),
    Workload("prefill", Lengths(1024, 1), 10, concurrency=1),
    Workload("closed-8", MIDDLE, 40, concurrency=8),
    Workload("poisson-1", MIDDLE, 50, rate=1.0),
    Workload("poisson-long", LONG, 25, rate=0.5),
    Workload("mix", Lengths(64, 128), 30, rate=1.0, long=Lengths(1536, 16), long_share=0.2, once=True),
)

GOODPUT_LENGTHS = MIDDLE
GOODPUT_SLO = Slo({"ttft": 2500.0, "tpot": 60.0})
GOODPUT_ATTAINMENT = 0.9
GOODPUT_RATES = tuple(round(2 ** (step / 4), 2) for step in range(-8, 13))  # 0.25 to 8 a second, 19 % apart
GOODPUT_FIRST = 8  # the rate of 1 a second is tried first
GOODPUT_SECONDS = 30.0  # of arrivals at each rate
GOODPUT_LEAST = 20  # requests at each rate

# By name, in the order of measuring; start and idle need no load, goodput is many.
ORDER = ("start", "idle", *(workload.name for workload in WORKLOADS), "goodput")
ONCE = frozenset(workload.name for workload in WORKLOADS if workload.once)

TARGETS = (
    Target("single", "mean_tpot_ms", "vLLM", 0.55),
    Target("decode-16", "output_throughput", "vLLM", 1.7, at_least=True),
    Target("prefill", "mean_ttft_ms", "vLLM", 0.85),
    Target("closed-8", "request_throughput", "vLLM", 1.4, at_least=True),
    Target("closed-8", "p99_itl_ms", "vLLM", 1 / 20),
    Target("poisson-1", "mean_ttft_ms", "vLLM", 1.0),
    Target("poisson-1", "p99_itl_ms", "vLLM", 1 / 25),
    Target("poisson-1", "p99_tpot_ms", "vLLM", 1 / 3),
    Target("poisson-long", "p99_itl_ms", "vLLM", 1 / 40),
    Target("goodput", "rate", "vLLM", 3.0, at_least=True),
    Target("idle", "cpu_fraction", None, 0.05),
    Target("start", "seconds", "vLLM", 1 / 10),
    Target("start", "seconds", None, 8.0),
)

# What the table shows of each workload, next to what the targets name.
SHOWN = {
    "single": ("mean_ttft_ms", "mean_tpot_ms"),
    "decode-16": ("output_throughput", "mean_tpot_ms"),
    "prefill": ("mean_ttft_ms",),
    "closed-8": ("request_throughput", "mean_ttft_ms", "median_itl_ms", "p99_itl_ms", "p99_icl_ms"),
    "poisson-1": ("mean_ttft_ms", "p99_ttft_ms", "p99_itl_ms", "p99_icl_ms", "p99_tpot_ms"),
    "poisson-long": ("mean_ttft_ms", "p99_itl_ms", "p99_icl_ms", "p99_tpot_ms"),
    "mix": ("mean_ttft_ms", "p99_itl_ms", "max_itl_ms"),
    "goodput": ("rate",),
    "idle": ("cpu_fraction", "resident_mib"),
    "start": ("seconds",),
}
