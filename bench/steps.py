"""Times whole steps of a model, without engine and cluster, beside the machine's limits measured in the same run.

    python -m bench.steps [--threads 1] [--quantization int8] [--model NAME]

Prefill counts the operations of linear layers, attention and one row of logits; its limit is the library's best
bfloat16 matrix product. Decode counts the weights and KV that a step reads; its limit is reading memory.
Medians; each limit is timed right before what it is compared with.
"""

from __future__ import annotations

import argparse
from statistics import median
from time import perf_counter

import torch

from bench.kernels import GIB, Budget, library_rate, read_bandwidth
from engine.config import EngineConfig
from engine.runner import Runner
from engine.scheduler import Scheduled
from engine.sequence import Sequence
from engine.weights import open_model
from kernels.cpu.backend import CpuKernels
from splitserve.hashing import PrefixHasher
from splitserve.models import resolve_model
from splitserve.sampling import SamplingParams

BUDGET = Budget(rounds=7, resident=GIB // 4)
PREFILL = 1024
DECODES = ((1, 16), (1, 1024), (8, 512), (16, 96), (32, 16))  # sequences, context


def sequences(count: int, tokens: int, computed: int) -> list[Sequence]:
    """``tokens`` known, KV of ``computed`` of them claimed to be there."""
    made = []
    for i in range(count):
        ids = torch.randint(100, 40000, (tokens,)).tolist()
        params = SamplingParams(temperature=0)
        hasher = PrefixHasher(b"")
        sequence = Sequence(f"s{i}", ids, tokens, params, frozenset(), 1 << 20, hasher, num_computed=computed)
        blocks = -(-tokens // 16)
        sequence.blocks = list(range(i * blocks, (i + 1) * blocks))
        made.append(sequence)
    return made


def step_seconds(runner: Runner, made: list[Sequence], rounds: int) -> list[float]:
    """Times of the same step, sorted, after one that is not counted."""
    scheduled = [Scheduled.of(s, s.remaining) for s in made]
    times = []
    for _ in range(rounds + 1):
        start = perf_counter()
        runner.collect(runner.launch(scheduled))
        times.append(perf_counter() - start)
    return sorted(times[1:])


def show(name: str, times: list[float], work: float, unit: str, limit: float) -> None:
    taken = median(times)
    rate = work / taken / 1e9
    figures = f"{taken * 1e3:>8.2f} ms (best {times[0] * 1e3:.2f}){rate:>8.1f} {unit}"
    print(f"  {name:<36}{figures}  {rate / limit:.0%} of {limit:.1f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quantization", choices=["int8"])
    options = parser.parse_args()
    files = open_model(resolve_model(options.model))
    config = EngineConfig(
        model=options.model, threads=options.threads, quantization=options.quantization,
        max_num_batched_tokens=PREFILL, kv_cache_memory=GIB,
    )  # fmt: skip
    runner = Runner(config, files)
    assert isinstance(runner.kernels, CpuKernels)
    kernels, c = runner.kernels, files.config
    print(f"== {kernels.isa}, threads: {options.threads}, weights: {options.quantization or 'bfloat16'}")
    layer = (
        c.hidden_size * (c.num_heads * 2 + c.num_kv_heads * 2) * c.head_dim
        + 3 * c.hidden_size * c.intermediate_size
    )
    weights, head = c.num_layers * layer, c.vocab_size * c.hidden_size
    pairs = PREFILL * (PREFILL + 1) // 2
    done = 2 * PREFILL * weights + 4 * pairs * c.num_heads * c.head_dim * c.num_layers + 2 * head
    rate = library_rate(torch.bfloat16, PREFILL, BUDGET)
    show(
        f"prefill of {PREFILL} tokens", step_seconds(runner, sequences(1, PREFILL, 0), 9), done, "GFLOP/s",
        rate,
    )  # fmt: skip
    size = 1 if options.quantization else 2
    for count, context in DECODES:
        read = size * (weights + head) + count * context * runner.layout.token_bytes
        limit = read_bandwidth(kernels, BUDGET)
        made = sequences(count, context, context - 1)
        show(
            f"decode, {count} sequences, context {context}", step_seconds(runner, made, 25), read, "GB/s",
            limit,
        )  # fmt: skip


if __name__ == "__main__":
    main()
