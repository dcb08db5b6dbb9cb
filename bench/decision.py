"""What one routing decision costs: ``python -m bench.decision [--workers 100] [--tokens 32768]``.

The router's own planner beside a real Redis in which all workers have registered and claimed blocks. Every
decision is about a new prompt of which one worker in ten owns a beginning. Prints medians of the whole and of its
parts. Invariant: nothing of a decision is left out but the network, which a look-up crosses once.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import secrets
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import uvloop

from bench.echo import echo_spec, read_tokenizer
from bench.machine import describe
from router.backend import GenerationRequest, ModelSpec
from router.planner import Planner
from router.policy import PolicyConfig
from router.snapshot import ClusterView
from splitserve.cluster import Role, WorkerInfo
from splitserve.directory import Directory
from splitserve.errors import ConfigError
from splitserve.hashing import PrefixHasher
from splitserve.redis_server import PrivateRedis
from splitserve.sampling import SamplingParams

CLAIMED = 1024  # blocks that each worker owns of other prompts


@dataclass(slots=True)
class Times:
    """Seconds of each repetition, by part."""

    parts: dict[str, list[float]] = field(default_factory=dict)

    def add(self, part: str, began: float) -> None:
        self.parts.setdefault(part, []).append(time.perf_counter() - began)

    def lines(self) -> list[str]:
        return [f"{part}: {median(taken) * 1e3:.2f} ms" for part, taken in self.parts.items()]


async def join(directory: Directory, spec: ModelSpec, count: int) -> list[WorkerInfo]:
    """Half prefill, half decode workers, each with claims of its own."""
    workers = []
    for number in range(count):
        role = Role.PREFILL if number % 2 else Role.DECODE
        info = WorkerInfo(
            id=f"{role}-{number}",
            role=role,
            model=spec.name,
            fingerprint=spec.fingerprint,
            grpc_address=f"10.0.0.1:{number}",
            block_tokens=spec.block_tokens,
            num_blocks=100_000,
            max_num_seqs=256,
            max_model_len=spec.max_model_len,
        )
        workers.append(await directory.register(info))
        await directory.apply_block_events(workers[-1], [secrets.token_bytes(32) for _ in range(CLAIMED)], [])
    return workers


async def measure(count: int, tokens: int, repetitions: int, spec: ModelSpec) -> Times:
    """Times of ``repetitions`` decisions."""
    times, rng = Times(), random.Random()
    with tempfile.TemporaryDirectory() as folder:
        async with (
            PrivateRedis(Path(folder)) as url,
            Directory(url, lease_seconds=3600.0) as directory,
        ):
            workers = await join(directory, spec, count)
            async with ClusterView(directory, refresh_seconds=3600.0) as view:
                planner = Planner(directory, view, PolicyConfig())
                for _ in range(repetitions):
                    prompt = [rng.randrange(spec.vocab_size) for _ in range(tokens)]
                    await _decide(planner, directory, spec, workers, prompt, times)
    return times


async def _decide(
    planner: Planner,
    directory: Directory,
    spec: ModelSpec,
    workers: Sequence[WorkerInfo],
    prompt: Sequence[int],
    times: Times,
) -> None:
    began = time.perf_counter()
    hashes = PrefixHasher(bytes.fromhex(spec.fingerprint)).next_blocks(prompt, spec.block_tokens)
    times.add("of these, names of the prompt's blocks", began)
    for worker in random.sample(workers, max(1, len(workers) // 10)):
        await directory.apply_block_events(worker, hashes[: random.randrange(1, len(hashes) + 1)], [])
    began = time.perf_counter()
    await directory.longest_prefix(hashes, [(worker.id, worker.epoch) for worker in workers])
    times.add("of these, look-up in Redis", began)
    request = GenerationRequest("r", spec.name, prompt, SamplingParams(max_tokens=128))
    began = time.perf_counter()
    await planner.plan(request, spec, prompt, ())
    times.add("one decision", began)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns 0; raises ConfigError."""
    p = argparse.ArgumentParser(prog="bench decision", description="Times routing decisions.")
    p.add_argument("--workers", type=int, nargs="+", default=[100])
    p.add_argument("--tokens", type=int, nargs="+", default=[32_768], help="of a prompt")
    p.add_argument("--repetitions", type=int, default=50)
    options = p.parse_args(arguments)
    spec = echo_spec(read_tokenizer("smollm2"), context=max(options.tokens) + 1024)
    print(f"{describe()['cpu']}, Redis on the same machine, medians of {options.repetitions}")
    for count in options.workers:
        for tokens in options.tokens:
            print(f"== {count} workers, prompt of {tokens:,} tokens")
            with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                print("\n".join(runner.run(measure(count, tokens, options.repetitions, spec)).lines()))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ConfigError as problem:
        sys.exit(f"bench decision: {problem}")
