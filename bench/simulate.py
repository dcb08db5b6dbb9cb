"""Routing at scale, in simulated time: ``python -m bench.simulate --trace FILE``.

The router's own policy and four others route a recorded hour over modelled workers with prefix caches, at a
multiple of its rate: replayed faster (``--speed``), or as several hours at once that share nothing (``--copies``,
which keeps the time between the turns of a chat). Prints cache hits, attainment and goodput of each, or with
``--sweep`` how many workers of each pool a load needs. Service times are given (``bench/sim/model.py``), not
measured: what is compared is where requests go.
Invariant: one seed, one result.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from bench.report import save
from bench.sim.cluster import SimulatedCluster
from bench.sim.model import Hardware, Limits, Outcome, Report, requests_of
from bench.sim.rules import RULES, Rule
from bench.trace import TraceEntry, copied, read_trace, turned
from splitserve.errors import ConfigError

MakeRule = Callable[[random.Random], Rule]
_SEARCH_STEPS, _NEAR = 6, 0.01


def simulate(
    entries: Sequence[TraceEntry],
    speed: float,
    pools: tuple[int, int],
    hardware: Hardware,
    make_rule: MakeRule,
    limits: Limits,
    seed: int,
) -> Report:
    """The trace at ``speed`` times its rate through one rule; ``pools``: prefill and decode workers."""
    requests = requests_of(entries, speed)
    cluster = SimulatedCluster(*pools, hardware, make_rule(random.Random(seed)))
    outcomes = cluster.run(requests)
    arrivals = max(requests[-1].time - requests[0].time, 1e-9)
    return _report(outcomes, limits, arrivals, cluster)


def _report(outcomes: Sequence[Outcome], limits: Limits, seconds: float, cluster: SimulatedCluster) -> Report:
    served = [outcome for outcome in outcomes if not outcome.refused]
    count = len(outcomes)
    ttfts = [outcome.ttft for outcome in served] or [0.0]
    tpots = [outcome.tpot for outcome in served] or [0.0]
    kept = sum(limits.kept(outcome) for outcome in outcomes)
    return Report(
        requests=count,
        refused=count - len(served),
        hit_rate=sum(o.cached_tokens for o in served) / max(1, sum(o.request.input_tokens for o in served)),
        ttft_attainment=sum(ttft <= limits.ttft for ttft in ttfts) / count,
        tpot_attainment=sum(tpot <= limits.tpot for tpot in tpots) / count,
        attainment=kept / count,
        goodput=kept / seconds,
        ttft_p50=float(np.percentile(ttfts, 50)),
        ttft_p99=float(np.percentile(ttfts, 99)),
        tpot_p99=float(np.percentile(tpots, 99)),
        prefill_busy=cluster.prefill_busy,
        decode_held=cluster.decode_held,
    )


def speed_of_load(load: float, first: float, report_at: Callable[[float], Report]) -> float:
    """The speed at which the busier pool is busy for ``load`` of the time, to about 1 %, sought from ``first``.

    ``first`` is to be too low rather than too high: a pool that is full says nothing of how much is too much.
    """
    speed = first
    for _ in range(_SEARCH_STEPS):
        report = report_at(speed)
        busy = max(report.prefill_busy, report.decode_held)
        if abs(busy - load) < _NEAR * load:
            break
        speed *= load / busy
    return speed


def _speed_without_cache(load: float, entries: Sequence[TraceEntry], workers: int, hardware: Hardware) -> float:
    """The speed that would keep the prefill pool this busy if no prompt were ever cached."""
    work = sum(hardware.prefill_seconds(0, entry.input_tokens) for entry in entries)
    return load * workers * max(entries[-1].time, 1e-9) / work


def workers_needed(
    report_at: Callable[[tuple[int, int]], Report], attainment: float, most: int
) -> tuple[int, int] | None:
    """Small pools with which ``attainment`` is reached; None if pools of ``most`` do not.

    Each pool as small as can be beside an ample other one; then both grow by turns until they suffice together.
    """

    def enough(prefills: int, decodes: int) -> bool:
        return report_at((prefills, decodes)).attainment >= attainment

    prefills = _least(1, most, lambda size: enough(size, most))
    decodes = _least(1, most, lambda size: enough(most, size))
    if prefills is None or decodes is None:
        return None
    grow_prefills = True
    while not enough(prefills, decodes):
        if (grow_prefills and prefills < most) or decodes == most:
            prefills += 1
        else:
            decodes += 1
        grow_prefills = not grow_prefills
    return prefills, decodes


def _least(low: int, high: int, enough: Callable[[int], bool]) -> int | None:
    if not enough(high):
        return None
    while low < high:
        middle = (low + high) // 2
        if enough(middle):
            high = middle
        else:
            low = middle + 1
    return high


def _line(name: str, report: Report) -> str:
    return (
        f"{name:<20}{report.hit_rate:>8.1%}{report.ttft_attainment:>8.1%}{report.tpot_attainment:>8.1%}"
        f"{report.attainment:>8.1%}{report.goodput:>10.1f}{report.ttft_p50:>9.2f}{report.ttft_p99:>9.2f}"
        f"{report.tpot_p99 * 1e3:>9.1f}{report.prefill_busy:>9.0%}{report.decode_held:>9.0%}{report.refused:>9}"
    )


_HEAD = (
    f"{'rule':<20}{'hits':>8}{'TTFT':>8}{'TPOT':>8}{'both':>8}{'goodput':>10}{'TTFT p50':>9}{'p99 s':>9}"
    f"{'TPOT p99':>9}{'prefill':>9}{'KV held':>9}{'refused':>9}"
)


def parser() -> argparse.ArgumentParser:
    """The flags."""
    p = argparse.ArgumentParser(prog="bench simulate", description="Compares rules of routing in simulated time.")
    p.add_argument("--trace", type=Path, required=True)
    p.add_argument("--requests", type=int, help="of the trace; default: all")
    p.add_argument("--copies", type=int, default=1, help="the trace so many times at once, sharing nothing")
    p.add_argument("--speed", type=float, nargs="+", help="times the trace's rate")
    p.add_argument(
        "--load", type=float, default=0.8, help="without --speed: how busy our rule keeps the busier pool"
    )
    p.add_argument("--prefill", type=int, default=64, help="workers")
    p.add_argument("--decode", type=int, default=64, help="workers")
    p.add_argument("--sweep", action="store_true", help="how many workers each rule needs at each speed")
    p.add_argument("--attainment", type=float, default=0.9, help="for --sweep: of requests within the limits")
    p.add_argument("--ttft", type=float, default=10.0, help="limit in seconds")
    p.add_argument("--tpot", type=float, default=0.05, help="limit in seconds")
    p.add_argument("--rules", nargs="+", help="names, or parts of them; default: all")
    p.add_argument("--seed", type=int, default=0, help="0: the trace as recorded; others begin elsewhere in it")
    p.add_argument("--result-filename", type=Path)
    hardware = p.add_argument_group("hardware of one worker")
    for known in fields(Hardware):
        default = getattr(Hardware(), known.name)
        hardware.add_argument(f"--{known.name.replace('_', '-')}", type=type(default), default=default)
    return p


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns 0; raises ConfigError."""
    options = parser().parse_args(arguments)
    hardware = replace(Hardware(), **{known.name: getattr(options, known.name) for known in fields(Hardware)})
    recorded = read_trace(options.trace, options.requests)
    entries = turned(copied(recorded, options.copies, options.seed), options.seed)
    limits = Limits(options.ttft, options.tpot)
    makers = {make(random.Random()).name: make for make in RULES}
    chosen = {
        name: make
        for name, make in makers.items()
        if not options.rules or any(part.lower() in name.lower() for part in options.rules)
    }
    if not chosen:
        raise ConfigError(f"--rules: none of {', '.join(makers)}")

    def run(make: MakeRule, speed: float, pools: tuple[int, int]) -> Report:
        return simulate(entries, speed, pools, hardware, make, limits, options.seed)

    pools = (options.prefill, options.decode)
    ours = RULES[0]
    if options.speed:
        speeds = options.speed
    else:
        first = _speed_without_cache(options.load, entries, options.prefill, hardware)
        speeds = [speed_of_load(options.load, first, lambda speed: run(ours, speed, pools))]
    print(f"{len(entries)} requests, limits: TTFT {limits.ttft:g} s, TPOT {limits.tpot * 1e3:g} ms")
    results: dict[str, Any] = {"hardware": asdict(hardware), "limits": asdict(limits), "speeds": {}}
    for speed in speeds:
        rate = len(entries) * speed / max(entries[-1].time, 1e-9)
        if options.sweep:
            print(f"speed {speed:.3g} ({rate:.0f} req/s): workers for {options.attainment:.0%} within the limits")
            needed = {
                name: workers_needed(
                    lambda pools, make=make, speed=speed: run(make, speed, pools),  # type: ignore[misc]
                    options.attainment,
                    max(pools),
                )
                for name, make in chosen.items()
            }
            for name, sizes in needed.items():
                print(f"  {name:<20}{f'{sizes[0]} prefill, {sizes[1]} decode' if sizes else 'more than allowed'}")
            results["speeds"][f"{speed:.4g}"] = needed
            continue
        print(f"speed {speed:.3g} ({rate:.0f} req/s), {pools[0]} prefill and {pools[1]} decode workers\n{_HEAD}")
        reports = {}
        for name, make in chosen.items():
            began = time.perf_counter()
            reports[name] = run(make, speed, pools)
            print(f"{_line(name, reports[name])}   [{time.perf_counter() - began:.0f} s to simulate]", flush=True)
        results["speeds"][f"{speed:.4g}"] = {name: asdict(report) for name, report in reports.items()}
    if options.result_filename:
        save(options.result_filename, results)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ConfigError as problem:
        sys.exit(f"bench simulate: {problem}")
