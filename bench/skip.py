"""When should a prompt skip the prefill worker? ``python -m bench.skip [--rounds 3]``.

Two clusters of one prefill and one decode worker: one sends every prompt to its prefill worker, the other none.
Both get the same load in turns: a few long answers that stream all the time, and prompts of one length that arrive
among them. Prints, by length: the time to the first token of those prompts, the whole time of their short answers,
and the time between tokens of the streaming ones. One cluster idles while the other is measured.
Invariant: prompts are fresh, so that no cache decides.
"""

from __future__ import annotations

import argparse
import asyncio
import secrets
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import uvloop

from bench.arrivals import Arrivals
from bench.datasets import Conversation, Lengths, Tokens, random_prompts
from bench.http_client import Server
from bench.load import Client, LoadResult, run_load
from bench.machine import describe
from bench.metrics import inter_token_latencies, samples
from bench.openai_api import Api
from bench.report import save
from bench.router import free_port
from bench.servers import RunningServer, ServerCommand, end_in_order
from splitserve.errors import ConfigError

WAYS = {"prefill worker": 0, "skipped": 1_000_000}  # by --decode-only-tokens
LENGTHS = (16, 32, 64, 128, 256, 512, 1024)
ANSWER = 16  # tokens of the answers to prompts that arrive
VOCAB = 32_000
_LEAD = 1.5  # seconds of streaming before the first prompt arrives
_SLOWEST_TOKEN = 0.03  # seconds; streams of so many tokens last for a whole window


def window(client: Client, length: int, options: argparse.Namespace) -> LoadResult:
    """Streaming answers, and prompts of ``length`` tokens that arrive at the rate asked for."""
    rng = np.random.default_rng(secrets.randbits(64))
    tokens = Tokens(rng, VOCAB)
    seconds = _LEAD + options.prompts / options.rate
    background = Lengths(32, round(seconds / _SLOWEST_TOKEN))
    streams = [Conversation(c.turns, "stream") for c in random_prompts(tokens, options.streams, background)]
    prompts = random_prompts(tokens, options.prompts, Lengths(length, ANSWER))
    offsets = [_LEAD + offset for offset in Arrivals(options.rate).offsets(options.prompts, rng)]
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(run_load(client, [*streams, *prompts], [*[0.0] * len(streams), *offsets]))


def figures(result: LoadResult) -> dict[str, float]:
    """Milliseconds. The gaps of the streams are those that end while prompts arrive or are answered."""
    prompts = [record for record in result.records if record.label != "stream"]
    if failed := next((record.error for record in result.records if record.error), None):
        raise ConfigError(f"a request failed: {failed}")
    began, ended = prompts[0].sent, max(record.ended for record in prompts)
    gaps = [
        gap * 1e3
        for record in result.records
        if record.label == "stream"
        for gap, arrival in zip(inter_token_latencies(record), record.arrivals[1:], strict=False)
        if began <= arrival.time <= ended
    ]
    return {
        "ttft": median(samples(prompts, "ttft")),
        "e2el": median(samples(prompts, "e2el")),
        "itl_mean": float(np.mean(gaps)),
        "itl_p99": float(np.percentile(gaps, 99)),
        "itl_max": max(gaps),
    }


def table(results: Mapping[int, Mapping[str, Sequence[Mapping[str, float]]]]) -> list[str]:
    """Medians over the rounds, as Markdown; each cell: prefill worker / skipped."""
    titles = {
        "ttft": "TTFT of the prompt",
        "e2el": f"its {ANSWER} tokens",
        "itl_mean": "ITL of others, mean",
        "itl_p99": "p99",
        "itl_max": "max",
    }
    lines = [f"| prompt tokens | {' | '.join(titles.values())} |", "|---|" + "---|" * len(titles)]
    for length, ways in results.items():
        cells = [
            " / ".join(f"{median(run[metric] for run in ways[way]):.0f}" for way in WAYS) for metric in titles
        ]
        lines.append(f"| {length} | {' | '.join(cells)} |")
    return lines


def main(arguments: Sequence[str] | None = None, say: Callable[[str], None] = print) -> int:
    """The command. Returns 0; raises ConfigError."""
    p = argparse.ArgumentParser(prog="bench skip", description="Prompts with and without a prefill worker.")
    p.add_argument("--model", default="smollm2")
    p.add_argument("--lengths", type=int, nargs="+", default=LENGTHS, help="tokens of the prompts that arrive")
    p.add_argument("--prompts", type=int, default=12, help="of each length in each window")
    p.add_argument("--rate", type=float, default=2.0, help="prompts a second, Poisson")
    p.add_argument("--streams", type=int, default=4, help="answers that stream all the time")
    p.add_argument("--rounds", type=int, default=1)
    p.add_argument("--result-filename", type=Path, help="writes JSON")
    options = p.parse_args(arguments)
    path: Path | None = options.result_filename
    results: dict[int, dict[str, list[Any]]] = {length: {way: [] for way in WAYS} for length in options.lengths}
    with ExitStack() as stack:
        clients = {}
        for way, limit in WAYS.items():
            port = free_port()
            command = (
                f"{sys.executable} -m splitserve up --model {options.model} --prefill 1 --decode 1 --port {port} "
                f"--grpc-port 0 --kv-cache-memory 1G --decode-only-tokens {limit}"
            )
            url = f"http://127.0.0.1:{port}"
            stack.enter_context(RunningServer(ServerCommand(way, command, url)))
            clients[way] = Client(Server.parse(url), Api("smollm2", ignore_eos=True))
            for length in (16, 1024):
                window(clients[way], length, argparse.Namespace(prompts=2, rate=4.0, streams=1))
        for _ in range(options.rounds):
            for length, ways in results.items():
                for way, client in clients.items():
                    ways[way].append(figures(window(client, length, options)))
                    shown = ", ".join(f"{name} {value:.0f}" for name, value in ways[way][-1].items())
                    say(f"{length} tokens, {way}: {shown} ms")
    say("\n".join([f"milliseconds, prefill worker / skipped; {describe()['cpu']}", "", *table(results)]))
    if path is not None:
        save(path, {str(length): ways for length, ways in results.items()})
    return 0


if __name__ == "__main__":
    end_in_order()
    try:
        sys.exit(main())
    except ConfigError as problem:
        sys.exit(f"bench skip: {problem}")
