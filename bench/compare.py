"""SplitServe and its peers on one machine: ``python -m bench.compare --peers peers.toml``.

All servers get the same workloads from the same client, in turns, ``--rounds`` times; figures are medians over the
rounds. Every result is kept in ``--results`` at once, and what is there is not measured again: the same command
goes on after an interruption, and writes the page, its JSON and the plots (extra ``bench``) again.
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
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

from bench.contest import Contest
from bench.page import write_page
from bench.peers import Peer, Peers, Probe, read_peers
from bench.plots import write_plots
from bench.report import save
from bench.results import ERROR, Results, without_series
from bench.rounds import Rounds, Say
from bench.router import free_port
from bench.servers import RunningServer, end_in_order
from bench.workloads import ORDER
from splitserve.errors import ConfigError

_PROBE_LINE = re.compile(r"^(.+?):\s+([\d.]+)\s*(.*)$", re.MULTILINE)
_PROBE_SECONDS = 900.0
_PROBE = "probe"  # in place of a workload


class Comparison:
    """One comparison: measures what its folder lacks, and reports what it holds."""

    def __init__(self, peers: Peers, options: argparse.Namespace, say: Say) -> None:
        self.results = Results(options.results or Path("build") / options.name)
        self._facts = self.results.facts(options.scale)
        self._peers = peers
        self._options = options
        self._cores = tuple(options.cores or ())
        self._say = say

    def measure(self) -> None:
        """All that is missing; the report is written after every turn."""
        workloads = [name for name in ORDER if name in self._options.workloads]
        rounds = Rounds(self._peers.servers, workloads, self._options.rounds, self.results)
        rounds.play(self._start, self._figures, self.write, self._say)
        for number in range(1, self._options.rounds + 1):
            for probe in self._peers.probes:
                if not self.results.has(probe.name, number, _PROBE):
                    self.results.put(probe.name, number, _PROBE, run_probe(probe, self._cores, self._say))
        self.write()

    def write(self) -> None:
        """Page, JSON and plots of what there is by now."""
        options = self._options
        runs = {peer.name: self.results.runs(peer.name) for peer in self._peers.servers}
        data = self._facts | {
            "command": f"python -m bench.compare {shlex.join(options.command)}",
            "note": self._peers.note,
            "rounds": options.rounds,
            "servers": {
                peer.name: {
                    "command": peer.command,
                    "note": peer.note,
                    "rounds": peer.rounds or options.rounds,
                    "stays": peer.stays,
                }
                for peer in self._peers.servers
            },
            "medians": {name: medians(rounds) for name, rounds in runs.items()},
            "probes": {
                probe.name: [run[_PROBE] for run in self.results.runs(probe.name)] for probe in self._peers.probes
            },
            "runs": runs,
        }
        options.out.mkdir(parents=True, exist_ok=True)
        plots = write_plots(data, options.out, options.name)
        write_page(data, options.out / f"{options.name}.md", plots)
        data["runs"] = {name: without_series(rounds) for name, rounds in runs.items()}
        save(options.out / f"{options.name}.json", data)

    @contextmanager
    def _start(self, peer: Peer) -> Iterator[RunningServer]:
        self._say(f"{time.strftime('%H:%M:%S')} {peer.name}: starting")
        with RunningServer(peer.server(free_port(), self._cores)) as server:
            self._say(f"  ready after {server.ready_seconds:.1f} s")
            self._contest(peer, server).warm_up()
            yield server

    def _figures(self, peer: Peer, server: RunningServer, workload: str) -> dict[str, Any]:
        earlier = [run["goodput"]["rate"] for run in self.results.runs(peer.name) if "goodput" in run]
        return self._contest(peer, server).measure(workload, earlier[-1] if earlier else None)

    def _contest(self, peer: Peer, server: RunningServer) -> Contest:
        return Contest(peer, server, self._options.scale, self._say)


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
        return {ERROR: str(error)}
    finally:
        os.sched_setaffinity(0, here)
    say(done.stdout.rstrip())
    return {name: {"value": float(value), "unit": unit} for name, value, unit in _PROBE_LINE.findall(done.stdout)}


def medians(rounds: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """By workload, then by metric: the median of all rounds that have a number there."""
    collected: dict[str, dict[str, list[float]]] = {}
    for results in rounds:
        for workload, figures in results.items():
            for metric, value in figures.items():
                if isinstance(value, int | float) and not isinstance(value, bool):
                    collected.setdefault(workload, {}).setdefault(metric, []).append(value)
    return {name: {metric: median(values) for metric, values in m.items()} for name, m in collected.items()}


def parser() -> argparse.ArgumentParser:
    """The flags."""
    p = argparse.ArgumentParser(prog="bench compare", description="Measures several servers in turns.")
    p.add_argument("--peers", type=Path, required=True, help="TOML file; see bench/peers.example.toml")
    p.add_argument("--only", nargs="+", metavar="NAME", help="of the servers")
    p.add_argument(
        "--workloads", nargs="+", choices=ORDER, default=ORDER, metavar="WORKLOAD", help=" ".join(ORDER)
    )
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--scale", type=float, default=1.0, help="times the numbers of requests; below 1 only to try")
    p.add_argument("--cores", type=int, nargs="+", help="for the servers; default: all")
    p.add_argument("--results", type=Path, help="folder of single results; default: build/NAME")
    p.add_argument("--out", type=Path, default=Path("docs/benchmarks"), help="folder of the report")
    p.add_argument("--name", default="compare", help="of the files in it")
    return p


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns 0; raises ConfigError."""
    options = parser().parse_args(arguments)
    options.command = list(sys.argv[1:] if arguments is None else arguments)
    peers = read_peers(options.peers)
    if options.only:
        if unknown := set(options.only) - {peer.name for peer in peers.servers}:
            raise ConfigError(f"--only: no server is called {', '.join(sorted(unknown))}")
        peers = Peers(tuple(peer for peer in peers.servers if peer.name in options.only), (), peers.note)
    Comparison(peers, options, lambda text: print(text, flush=True)).measure()
    print(f"written: {options.out / options.name}.md")
    return 0


if __name__ == "__main__":
    end_in_order()
    try:
        sys.exit(main())
    except ConfigError as problem:
        sys.exit(f"bench compare: {problem}")
