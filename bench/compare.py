"""SplitServe and its peers on one machine: ``python -m bench.compare --peers peers.toml``.

All servers get the same workloads from the same client, one server at a time, in turns, ``--rounds`` times;
figures are medians over the rounds. Writes JSON, a page with tables of ratios, and plots (extra ``bench``).
Invariant: what a server failed at is in the results; nothing is left out for being slow.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import orjson

from bench.contest import Contest, Say
from bench.machine import describe
from bench.page import write_page
from bench.peers import Peer, Peers, Probe, read_peers
from bench.plots import write_plots
from bench.report import save
from bench.router import free_port
from bench.servers import RunningServer, end_in_order
from bench.workloads import OTHERS, WORKLOADS
from splitserve.errors import ConfigError

_PROBE_LINE = re.compile(r"^(.+?):\s+([\d.]+)\s*(.*)$", re.MULTILINE)
_PROBE_SECONDS = 900.0


def run_server(
    peer: Peer, wanted: Sequence[str], scale: float, cores: tuple[int, ...], say: Say
) -> dict[str, Any]:
    """Results by workload; an ``error`` in place of what could not be measured."""
    say(f"{peer.name}: starting")
    results: dict[str, Any] = {}
    try:
        with RunningServer(peer.server(free_port(), cores)) as server:
            say(f"  ready after {server.ready_seconds:.1f} s")
            results["start"] = {"seconds": server.ready_seconds}
            contest = Contest(peer, server, scale, say)
            contest.warm_up()
            if "idle" in wanted and peer.takes("idle"):
                results["idle"] = contest.idle()
            for workload in WORKLOADS:
                if workload.name in wanted and peer.takes(workload.name):
                    results[workload.name] = contest.run(workload)
            if "goodput" in wanted and peer.takes("goodput"):
                results["goodput"] = contest.goodput()
    except ConfigError as error:
        say(f"  {error.message}")
        results["error"] = error.message
    return results


def run_probe(probe: Probe, cores: tuple[int, ...], say: Say) -> dict[str, Any]:
    """What a command prints about itself: ``{line: {"value": ..., "unit": ...}}``."""
    say(f"{probe.name}: {probe.command}")
    here = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, cores or here)
        done = subprocess.run(
            shlex.split(probe.filled()), capture_output=True, text=True, check=True, timeout=_PROBE_SECONDS
        )
    except (OSError, subprocess.SubprocessError) as error:
        say(f"  {error}")
        return {"error": str(error)}
    finally:
        os.sched_setaffinity(0, here)
    say(done.stdout.rstrip())
    return {name: {"value": float(value), "unit": unit} for name, value, unit in _PROBE_LINE.findall(done.stdout)}


def medians(rounds: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """By workload, then by metric: the median of all rounds that have a number there."""
    collected: dict[str, dict[str, list[float]]] = {}
    for results in rounds:
        for workload, figures in results.items():
            if isinstance(figures, dict):
                for metric, value in figures.items():
                    if isinstance(value, int | float) and not isinstance(value, bool):
                        collected.setdefault(workload, {}).setdefault(metric, []).append(value)
    return {name: {metric: median(values) for metric, values in m.items()} for name, m in collected.items()}


def compare(peers: Peers, options: argparse.Namespace, say: Say) -> dict[str, Any]:
    """All rounds of all servers, and their medians."""
    cores = tuple(options.cores or ())
    rounds: dict[str, list[dict[str, Any]]] = {peer.name: [] for peer in peers.servers}
    probes: dict[str, list[dict[str, Any]]] = {probe.name: [] for probe in peers.probes}
    for number in range(options.rounds):
        say(f"== round {number + 1} of {options.rounds}, {time.strftime('%H:%M:%S')}")
        for peer in peers.servers:
            rounds[peer.name].append(run_server(peer, options.workloads, options.scale, cores, say))
        for probe in peers.probes:
            probes[probe.name].append(run_probe(probe, cores, say))
    return {
        "date": time.strftime("%Y-%m-%d"),
        "machine": describe(),
        "command": f"python -m bench.compare {shlex.join(options.command)}",
        "rounds": options.rounds,
        "scale": options.scale,
        "servers": {peer.name: {"command": peer.command, "note": peer.note} for peer in peers.servers},
        "medians": {name: medians(results) for name, results in rounds.items()},
        "probes": probes,
        "runs": rounds,
    }


def parser() -> argparse.ArgumentParser:
    """The flags."""
    names = [*(workload.name for workload in WORKLOADS), *OTHERS]
    p = argparse.ArgumentParser(prog="bench compare", description="Measures several servers in turns.")
    p.add_argument("--peers", type=Path, help="TOML file; see bench/peers.example.toml")
    p.add_argument("--only", nargs="+", metavar="NAME", help="of the servers")
    p.add_argument(
        "--workloads", nargs="+", choices=names, default=names, metavar="WORKLOAD", help=" ".join(names)
    )
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--scale", type=float, default=1.0, help="times the numbers of requests; below 1 only to try")
    p.add_argument("--cores", type=int, nargs="+", help="for the servers; default: all")
    p.add_argument("--out", type=Path, default=Path("docs/benchmarks"), help="folder of the results")
    p.add_argument("--name", default="compare", help="of the files in it")
    p.add_argument("--again", type=Path, metavar="JSON", help="writes page and plots from earlier results")
    return p


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns 0; raises ConfigError."""
    options = parser().parse_args(arguments)
    options.command = list(sys.argv[1:] if arguments is None else arguments)
    if options.again:
        data = orjson.loads(options.again.read_bytes())
    elif options.peers is None:
        raise ConfigError("--peers is needed; bench/peers.example.toml shows how it looks")
    else:
        peers = read_peers(options.peers)
        if options.only:
            if unknown := set(options.only) - {peer.name for peer in peers.servers}:
                raise ConfigError(f"--only: no server is called {', '.join(sorted(unknown))}")
            peers = Peers(tuple(peer for peer in peers.servers if peer.name in options.only), peers.probes)
        data = compare(peers, options, lambda text: print(text, flush=True))
        save(options.out / f"{options.name}.json", data)
    plots = write_plots(data, options.out, options.name)
    page = write_page(data, options.out / f"{options.name}.md", plots)
    print(f"written: {page}, {', '.join(map(str, plots)) or 'no plots'}")
    return 0


if __name__ == "__main__":
    end_in_order()
    try:
        sys.exit(main())
    except ConfigError as problem:
        sys.exit(f"bench compare: {problem}")
