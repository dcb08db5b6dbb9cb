"""Times the native CPU kernels beside the machine's own limits, measured in the same run.

    python -m bench.kernels [--threads 1 2] [--isa amx] [--quick]

Shapes are SmolLM2-135M's. Operands that a model step would read from memory are so many that they do here too,
and lie where the engine's do (`kernels.memory`). A limit is what the same threads reach on plain work: reading
memory of that kind, or the library's matrix product. Each figure is the median of several rounds, and the limit is
timed anew beside every group of figures.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import AttentionBatch, pool_shape
from kernels.cpu.backend import CpuKernels
from kernels.memory import zeros

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, INTERMEDIATE, LAYERS = 576, 9, 3, 64, 1536, 30
BLOCK_TOKENS = 16
SHAPES = {
    "qkv": (960, HIDDEN),
    "o": (HIDDEN, HIDDEN),
    "gate_up": (2 * INTERMEDIATE, HIDDEN),
    "down": (HIDDEN, INTERMEDIATE),
}
GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class Budget:
    """How long to measure."""

    rounds: int
    resident: int  # bytes of operands that one round goes through


def seconds(run: Callable[[], object], rounds: int) -> float:
    """Median time of ``run`` after one call that is not counted."""
    run()
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return median(times)


def line(name: str, taken: float, value: float, unit: str, limit: float) -> None:
    print(f"  {name:<34}{taken * 1e6:>11.1f} us{value:>9.1f} {unit:<8}{value / limit:>7.0%} of {limit:.1f}")


def read_bandwidth(kernels: CpuKernels, budget: Budget) -> float:
    """GB/s of reading memory."""
    data = zeros(budget.resident).fill_(1)
    return budget.resident / seconds(lambda: kernels.read_memory(data), budget.rounds) / 1e9


def library_rate(dtype: torch.dtype, rows: int, budget: Budget) -> float:
    """GFLOP/s of torch's matrix product, the best of the four shapes."""
    rates = []
    for n, k in SHAPES.values():
        x, weight = torch.randn(rows, k).to(dtype), torch.randn(n, k).to(dtype)
        taken = seconds(partial(F.linear, x, weight), budget.rounds * 3)
        rates.append(2 * rows * n * k / taken / 1e9)
    return max(rates)


def bench_linear_few_rows(kernels: CpuKernels, kind: str, budget: Budget) -> None:
    """``kind``: bfloat16, float32, or int8 (bfloat16 activations)."""
    limit = read_bandwidth(kernels, budget)
    print(f"linear, {kind} weights, few rows; limit: reading memory, GB/s")
    dtype = torch.float32 if kind == "float32" else torch.bfloat16
    pack = kernels.pack_linear_int8 if kind == "int8" else kernels.pack_linear
    size = {"float32": 4, "bfloat16": 2, "int8": 1}[kind]
    for name, (n, k) in SHAPES.items():
        weights = [pack(torch.randn(n, k).to(dtype), None) for _ in range(budget.resident // (n * k * size))]
        for rows in (1, 2, 4, 8, 16):
            x = torch.randn(rows, k).to(dtype)

            def run(weights: Sequence[Callable[[Tensor], Tensor]] = weights, x: Tensor = x) -> None:
                for weight in weights:
                    weight(x)

            taken = seconds(run, budget.rounds) / len(weights)
            line(f"{name} {n} x {k}, {rows} rows", taken, n * k * size / taken / 1e9, "GB/s", limit)


def bench_linear_many_rows(kernels: CpuKernels, dtype: torch.dtype, budget: Budget) -> None:
    print(f"linear, {str(dtype).removeprefix('torch.')}, many rows; limit: torch's matrix product, GFLOP/s")
    for rows in (512, 1024):
        limit = library_rate(dtype, rows, budget)
        for name, (n, k) in SHAPES.items():
            linear, x = kernels.pack_linear(torch.randn(n, k).to(dtype), None), torch.randn(rows, k).to(dtype)
            taken = seconds(partial(linear, x), budget.rounds * 3)
            line(f"{name} {n} x {k}, {rows} rows", taken, 2 * rows * n * k / taken / 1e9, "GFLOP/s", limit)


def attention_batch(sequences: int, rows: int, context: int) -> AttentionBatch:
    """``sequences`` alike, whose blocks lie scattered over the pool."""
    blocks = -(-context // BLOCK_TOKENS)
    tables = torch.randperm(sequences * blocks, generator=torch.Generator().manual_seed(0)).int()
    tables = tables.view(sequences, blocks)
    positions = torch.arange(context - rows, context).repeat(sequences)
    owners = torch.arange(sequences).repeat_interleave(rows)
    return AttentionBatch(
        positions=positions,
        slots=tables[owners, positions // BLOCK_TOKENS].long() * BLOCK_TOKENS + positions % BLOCK_TOKENS,
        query_start=torch.arange(sequences + 1, dtype=torch.int32) * rows,
        context_lens=torch.full((sequences,), context, dtype=torch.int32),
        block_tables=tables,
        num_decodes=sequences if rows == 1 else 0,
        max_query=rows,
        max_context=context,
    )


def scattered_pool(blocks: int, dtype: torch.dtype) -> Tensor:
    shape = pool_shape(blocks, KV_HEADS, LAYERS, BLOCK_TOKENS, HEAD_DIM)
    return zeros(math.prod(shape) * dtype.itemsize).view(dtype).view(shape).normal_()


def bench_decode(kernels: CpuKernels, dtype: torch.dtype, budget: Budget) -> None:
    limit = read_bandwidth(kernels, budget)
    print(f"decode attention, {str(dtype).removeprefix('torch.')}, all layers; limit: reading memory, GB/s")
    for sequences, context in ((1, 16), (16, 16), (1, 1024), (4, 1024), (1, 4096)):
        batch = attention_batch(sequences, 1, context)
        kv = scattered_pool(batch.block_tables.numel(), dtype)
        q = torch.randn(sequences, HEADS, HEAD_DIM).to(dtype)

        def run(q: Tensor = q, kv: Tensor = kv, batch: AttentionBatch = batch) -> None:
            for layer in range(LAYERS):
                kernels.paged_attention(q, kv, layer, batch, 0.125)

        taken = seconds(run, budget.rounds * 3) / LAYERS
        held = sequences * context * KV_HEADS * 2 * HEAD_DIM * kv.element_size()
        line(f"{sequences} x context {context}", taken, held / taken / 1e9, "GB/s", limit)


def bench_chunk(kernels: CpuKernels, dtype: torch.dtype, budget: Budget) -> None:
    limit = library_rate(dtype, 1024, budget)
    print(f"chunk attention, {str(dtype).removeprefix('torch.')}; limit: torch's matrix product, GFLOP/s")
    for rows, context in ((1024, 1024), (512, 1024), (512, 4096), (64, 1024)):
        batch = attention_batch(1, rows, context)
        kv = scattered_pool(batch.block_tables.numel(), dtype)
        q = torch.randn(rows, HEADS, HEAD_DIM).to(dtype)
        layers = 4

        def run(q: Tensor = q, kv: Tensor = kv, batch: AttentionBatch = batch, layers: int = layers) -> None:
            for layer in range(layers):
                kernels.paged_attention(q, kv, layer, batch, 0.125)

        taken = seconds(run, budget.rounds * 2) / layers
        pairs = rows * (context - rows) + rows * (rows + 1) // 2  # of a row and a token that it sees
        done = 4 * pairs * HEADS * HEAD_DIM
        line(f"{rows} rows, context {context}", taken, done / taken / 1e9, "GFLOP/s", limit)


def bench_rows(kernels: CpuKernels, dtype: torch.dtype, budget: Budget) -> None:
    """The small operations; bytes read and written over the time, in cache for one row."""
    limit = read_bandwidth(kernels, budget)
    print(f"small operations, {str(dtype).removeprefix('torch.')}; limit: reading memory, GB/s")
    weight = torch.randn(HIDDEN).to(dtype)
    cos_sin = torch.randn(1024, HEAD_DIM)
    for rows in (1, 16, 1024):
        x, residual = torch.randn(rows, HIDDEN).to(dtype), torch.randn(rows, HIDDEN).to(dtype)
        gate_up = torch.randn(rows, 2 * INTERMEDIATE).to(dtype)
        sequences = rows if rows < 1024 else 1
        batch = attention_batch(sequences, rows // sequences, 1024)
        kv = scattered_pool(batch.block_tables.numel(), dtype)
        qkv = torch.randn(rows, HEADS + 2 * KV_HEADS, HEAD_DIM).to(dtype)
        q, k, v = torch.split(qkv, [HEADS, KV_HEADS, KV_HEADS], dim=1)
        size = x.element_size() * rows
        for name, moved, run in (
            ("rms_norm", 2 * HIDDEN, lambda x=x: kernels.rms_norm(x, weight, 1e-5)),
            ("add_rms_norm", 4 * HIDDEN, lambda x=x, r=residual: kernels.add_rms_norm(x, r, weight, 1e-5)),
            ("silu_mul", 3 * INTERMEDIATE, lambda g=gate_up: kernels.silu_mul(g)),
            (
                "rope_kv_write",
                2 * qkv[0].numel(),
                lambda q=q, k=k, v=v, kv=kv, b=batch: kernels.rope_kv_write(q, k, v, cos_sin, kv, 3, b),
            ),
        ):
            repeats = 200 if rows < 1024 else 5

            def many(run: Callable[[], object] = run, repeats: int = repeats) -> None:
                for _ in range(repeats):
                    run()

            taken = seconds(many, budget.rounds) / repeats
            line(f"{name}, {rows} rows", taken, moved * size / taken / 1e9, "GB/s", limit)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--isa", help="instruction set of the native kernels; default: the best")
    parser.add_argument("--quick", action="store_true", help="fewer rounds and less memory")
    parser.add_argument("--only", choices=["linear", "decode", "chunk", "rows"], nargs="+")
    options = parser.parse_args()
    budget = Budget(rounds=3, resident=GIB // 8) if options.quick else Budget(rounds=7, resident=GIB // 4)
    parts = options.only or ["linear", "decode", "chunk", "rows"]
    for threads in options.threads:
        torch.set_num_threads(threads)
        kernels = CpuKernels(isa=options.isa)
        print(f"== {kernels.isa}, threads: {threads}, torch {torch.__version__}")
        for kind in ("bfloat16", "float32", "int8"):
            if "linear" in parts:
                bench_linear_few_rows(kernels, kind, budget)
        for dtype in (torch.bfloat16, torch.float32):
            if "linear" in parts:
                bench_linear_many_rows(kernels, dtype, budget)
            if "decode" in parts:
                bench_decode(kernels, dtype, budget)
            if "chunk" in parts:
                bench_chunk(kernels, dtype, budget)
            if "rows" in parts:
                bench_rows(kernels, dtype, budget)
        kernels.close()


if __name__ == "__main__":
    main()
