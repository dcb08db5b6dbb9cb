"""What the router's front costs: ``python -m bench.router``.

The real HTTP front with a backend that echoes runs on one core, the client on another; beside it, measured in
turns in the same run, the least that a server in Python can do (``bench.bare``). Client and connection are in
both, so the difference is the front's own. On a machine with one core they share it: figures are lower.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import socket
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np
import uvloop

from bench.datasets import Conversation, Lengths, Tokens, random_prompts
from bench.http_client import Server
from bench.load import Client, LoadResult, run_load
from bench.openai_api import Api
from bench.report import save
from bench.servers import RunningServer, ServerCommand, end_in_order
from splitserve.errors import ConfigError

VOCAB = 32_000
MAX_ADDED_MS = 4.0
MIN_TOKENS_PER_SECOND = 15_000


@dataclass(frozen=True, slots=True)
class Case:
    """One request at a time, of this many prompt tokens, in this form."""

    prompt_tokens: int
    prompt_form: str  # of completions: tokens or text
    chat: bool = False

    @property
    def name(self) -> str:
        return f"{self.prompt_tokens} tokens as {'a chat' if self.chat else self.prompt_form}"


CASES = (
    Case(128, "tokens"),
    Case(1024, "tokens"),
    Case(128, "text"),
    Case(1024, "text"),
    Case(1024, "text", True),
)


def free_port() -> int:
    """A port of the loopback interface that nobody has now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _client(url: str, model: str, case: Case) -> Client:
    return Client(Server.parse(url), Api(model, case.chat, case.prompt_form, ignore_eos=True), timeout=60.0)


def _prompts(count: int, lengths: Lengths) -> list[Conversation]:
    return random_prompts(Tokens(np.random.default_rng(), VOCAB), count, lengths)


def run(client: Client, conversations: Sequence[Conversation], concurrency: int) -> LoadResult:
    """A closed loop. Raises ConfigError if a request failed."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        result = runner.run(run_load(client, conversations, [0.0] * len(conversations), concurrency))
    if failures := [record.error for record in result.records if record.error]:
        raise ConfigError(f"{len(failures)} requests failed: {failures[0]}")
    return result


def first_token_ms(url: str, model: str, case: Case, count: int) -> float:
    """Median time to the first token, one request at a time."""
    client = _client(url, model, case)
    run(client, _prompts(5, Lengths(case.prompt_tokens, 2)), 1)
    result = run(client, _prompts(count, Lengths(case.prompt_tokens, 2)), 1)
    return median(record.ttft for record in result.records) * 1e3


def tokens_per_second(server: RunningServer, model: str, streams: int, tokens: int) -> tuple[float, float]:
    """Streamed tokens a second, and a second of the server's CPU; each event carries one token."""
    client = _client(server.spec.url, model, CASES[0])
    run(client, _prompts(streams, Lengths(16, 16)), streams)
    cpu = server.weigh().cpu_seconds
    result = run(client, _prompts(streams, Lengths(16, tokens)), streams)
    cpu = server.weigh().cpu_seconds - cpu
    sent = sum(record.output_tokens for record in result.records)
    return sent / result.duration, sent / max(cpu, 0.01)


def _start(module: str, core: int, *flags: str) -> ServerCommand:
    port = free_port()
    command = f"{sys.executable} -m {module} --port {port} --cores {core} {' '.join(flags)}"
    return ServerCommand(module, command, f"http://127.0.0.1:{port}", cores=(core,), start_seconds=60.0)


def main(arguments: Sequence[str] | None = None, say: Callable[[str], None] = print) -> int:
    """The command. Returns 0 if both targets are met."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="whose tokenizer")
    parser.add_argument("--requests", type=int, default=100, help="of each case")
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=2000, help="of each stream")
    parser.add_argument("--rounds", type=int, default=3, help="in turns; medians are shown")
    parser.add_argument("--result-filename", type=Path, help="writes JSON")
    options = parser.parse_args(arguments)
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[-1]})
    waits: dict[str, list[tuple[float, float]]] = {case.name: [] for case in CASES}
    rates: list[tuple[float, float, float, float]] = []
    try:
        with (
            RunningServer(_start("bench.echo", cores[0], "--model", options.model)) as front,
            RunningServer(_start("bench.bare", cores[0])) as bare,
        ):
            for _ in range(options.rounds):
                for case in CASES:
                    ours = first_token_ms(front.spec.url, "echo", case, options.requests)
                    waits[case.name].append((ours, first_token_ms(bare.spec.url, "bare", case, options.requests)))
                ours_rate = tokens_per_second(front, "echo", options.streams, options.tokens)
                rates.append(ours_rate + tokens_per_second(bare, "bare", options.streams, options.tokens))
    finally:
        os.sched_setaffinity(0, cores)
    say(f"front on core {cores[0]}, client on core {cores[-1]}, medians of {options.rounds} rounds")
    say(f"{'first token of an idle request':<34}{'front':>10}{'bare':>10}{'added':>10}")
    added = {}
    for name, pairs in waits.items():
        ours, floor = (median(column) for column in zip(*pairs, strict=True))
        added[name] = ours - floor
        say(f"  {name:<32}{ours:>7.2f} ms{floor:>7.2f} ms{added[name]:>7.2f} ms")
    wall, cpu, bare_wall, bare_cpu = (median(column) for column in zip(*rates, strict=True))
    say(f"{'streamed tokens, one an event':<34}{'front':>10}{'bare':>10}{'part':>10}")
    say(f"  {'a second':<32}{wall:>10.0f}{bare_wall:>10.0f}{wall / bare_wall:>10.0%}")
    say(f"  {'a second of CPU':<32}{cpu:>10.0f}{bare_cpu:>10.0f}{cpu / bare_cpu:>10.0%}")
    worst = max(added.values())
    met = worst <= MAX_ADDED_MS and wall >= MIN_TOKENS_PER_SECOND
    say(f"targets: added <= {MAX_ADDED_MS} ms, >= {MIN_TOKENS_PER_SECOND} tokens/s: {'met' if met else 'MISSED'}")
    if options.result_filename:
        save(
            options.result_filename,
            {
                "added_first_token_ms": added,
                "tokens_per_second": wall,
                "tokens_per_cpu_second": cpu,
                "bare_tokens_per_second": bare_wall,
                "bare_tokens_per_cpu_second": bare_cpu,
                "streams": options.streams,
                "rounds": options.rounds,
            },
        )
    return 0 if met else 1


if __name__ == "__main__":
    end_in_order()
    try:
        sys.exit(main())
    except ConfigError as problem:
        sys.exit(f"bench router: {problem}")
