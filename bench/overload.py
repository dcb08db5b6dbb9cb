"""More than a server can do: ``python -m bench.overload --base-url http://127.0.0.1:8000``.

Finds the peak of the goodput with open loops at rising rates, then sends ``--factor`` times the rate of that peak
for ``--seconds`` and, without a pause, half of it. The peak is measured as long as the overload, because a short
load counts what is answered after its end. Says how much of the peak is left under overload, how soon what
is too much is refused, and how soon after it every request is answered in time again. Poisson arrivals, fresh
prompts; clients do not try again.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import uvloop

from bench.arrivals import Arrivals
from bench.datasets import Conversation, Lengths, Tokens, random_prompts
from bench.http_client import Server
from bench.load import Client, run_load
from bench.metrics import Slo
from bench.openai_api import Api
from bench.record import Record
from bench.serve import find_model
from splitserve.errors import ConfigError

_RISE = 1.3  # from one rate to the next
_MOST_RATES = 12

Make = Callable[[int], Sequence[Conversation]]  # so many conversations of one turn


@dataclass(frozen=True, slots=True)
class Load:
    """Whom to ask what, and what counts as answered in time."""

    client: Client
    make: Make
    slo: Slo
    rng: np.random.Generator


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of the requests of one phase. Rates are a second."""

    rate: float
    goodput: float
    refused: Sequence[float]  # seconds until each refusal
    failed: Sequence[str]

    def describe(self) -> str:
        text = f"{self.rate:8.2f}/s asked {self.goodput:8.2f}/s in time {len(self.refused):6d} refused"
        if self.refused:
            p50, p99, most = np.percentile(self.refused, [50, 99, 100]) * 1e3
            text += f" within {p50:.1f} ms (p99 {p99:.1f}, most {most:.1f})"
        return text + (f", {len(self.failed)} failed: {self.failed[0]}" if self.failed else "")


@dataclass(frozen=True, slots=True)
class Overload:
    peak: Outcome
    over: Outcome
    after: Outcome
    recovery: float | None  # seconds from the end of the overload; None: not within what was measured


def outcome(records: Sequence[Record], slo: Slo, seconds: float) -> Outcome:
    refused = [r.ended - r.sent for r in records if _refused(r)]
    failed = [r.error for r in records if r.error is not None and not _refused(r)]
    return Outcome(len(records) / seconds, sum(map(slo.kept, records)) / seconds, refused, failed)


async def at_rate(load: Load, rate: float, seconds: float) -> Outcome:
    """An open loop; returns when all requests have ended."""
    count = max(1, round(rate * seconds))
    result = await run_load(load.client, load.make(count), Arrivals(rate).offsets(count, load.rng))
    return outcome(result.records, load.slo, seconds)


async def find_peak(load: Load, rate: float, search: float, seconds: float, say: Callable[[str], None]) -> Outcome:
    """The outcome with the most goodput.

    Rates rise, ``search`` seconds each, until the goodput falls. ``seconds`` at the best of them and at the one
    below it, where the search may have flattered, decide.
    """
    best = await at_rate(load, rate, search)
    say(best.describe())
    for _ in range(_MOST_RATES):
        found = await at_rate(load, best.rate * _RISE, search)
        say(found.describe())
        if found.goodput <= best.goodput:
            break
        best = found
    peaks = [await at_rate(load, each, seconds) for each in (best.rate / _RISE, best.rate)]
    for peak in peaks:
        say(f"peak?    {peak.describe()}")
    return max(peaks, key=lambda each: each.goodput)


async def overload(load: Load, peak: Outcome, factor: float, seconds: float, after: float) -> Overload:
    """``factor`` times the peak for ``seconds``, then half of it for ``after``."""
    rates = ((peak.goodput * factor, 0.0, seconds), (peak.goodput / 2, seconds, after))
    offsets: list[float] = []
    for rate, start, length in rates:
        count = max(1, round(rate * length))
        offsets += [start + offset for offset in Arrivals(rate).offsets(count, load.rng)]
    result = await run_load(load.client, load.make(len(offsets)), offsets)
    end = result.began + seconds
    over = [record for record in result.records if record.scheduled < end]
    rest = [record for record in result.records if record.scheduled >= end]
    return Overload(
        peak, outcome(over, load.slo, seconds), outcome(rest, load.slo, after), _recovery(rest, load, end)
    )


def _recovery(rest: Sequence[Record], load: Load, end: float) -> float | None:
    """Seconds after which every request was answered in time; 0 if all were."""
    missed = [i for i, record in enumerate(rest) if not load.slo.kept(record)]
    if not missed:
        return 0.0
    return rest[missed[-1] + 1].sent - end if missed[-1] + 1 < len(rest) else None


def _refused(record: Record) -> bool:
    return record.error is not None and record.error.startswith(("status 429", "status 503"))


def main(arguments: Sequence[str] | None = None, say: Callable[[str], None] = print) -> int:
    """The command. Returns 0 if the targets are met."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--base-url", default="http://127.0.0.1:8000")
    p.add_argument("--model")
    p.add_argument("--random-input-len", type=int, default=512)
    p.add_argument("--random-output-len", type=int, default=64)
    p.add_argument("--vocab-size", type=int, default=32_000)
    p.add_argument("--goodput", nargs="+", default=["ttft:2500"], metavar="METRIC:MS")
    p.add_argument("--first-rate", type=float, default=0.5, help="where the search for the peak begins")
    p.add_argument("--search-seconds", type=float, default=15.0, help="of each rate of the search")
    p.add_argument("--factor", type=float, default=10.0)
    p.add_argument("--seconds", type=float, default=60.0, help="of overload, and of its peak")
    p.add_argument("--after-seconds", type=float, default=15.0)
    p.add_argument("--seed", type=int)
    options = p.parse_args(arguments)
    rng = np.random.default_rng(options.seed)
    tokens, lengths = Tokens(rng, options.vocab_size), Lengths(options.random_input_len, options.random_output_len)
    model = find_model(options.base_url, options.model, 0.0)
    client = Client(Server.parse(options.base_url), Api(model, False, "tokens", ignore_eos=True), timeout=120.0)
    load = Load(client, lambda count: random_prompts(tokens, count, lengths), Slo.parse(options.goodput), rng)

    async def measure() -> Overload:
        peak = await find_peak(load, options.first_rate, options.search_seconds, options.seconds, say)
        return await overload(load, peak, options.factor, options.seconds, options.after_seconds)

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        result = runner.run(measure())
    say(f"overload {result.over.describe()}")
    say(f"after    {result.after.describe()}")
    kept = result.over.goodput / result.peak.goodput
    slowest = max(result.over.refused, default=0.0)
    recovered = result.recovery is not None and result.recovery <= 5
    shown = "not seen" if result.recovery is None else f"{result.recovery:.1f} s"
    say(f"goodput {kept:.0%} of the peak (>= 90 %), slowest refusal {slowest * 1e3:.0f} ms (<= 50)")
    say(f"recovery {shown} (<= 5 s)")
    return 0 if kept >= 0.9 and slowest <= 0.05 and recovered else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ConfigError as problem:
        sys.exit(f"bench overload: {problem}")
