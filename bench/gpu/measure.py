"""Where a part measures, with what, and what it gives: the device, the sizes, the ceilings, rows of a table.

Ceilings are measured once in a call, at their first use. On a CPU the same code runs tiny shapes with the same
kernels in Triton's interpreter: figures mean nothing there. Knows no part.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from statistics import median
from typing import Any

import torch
from torch import Tensor

from bench.gpu.model import RandomFiles
from bench.gpu.scale import Scale
from engine import EngineConfig
from engine.core import Engine
from engine.device import CpuDevice
from engine.runner import Runner
from kernels import AttentionBatch, Kernels, load_kernels

CYCLES = 2e9  # of a GPU in about a second


@dataclass(frozen=True, slots=True)
class Line:
    """One row of the table. ``ratio`` and ``target``: None where there is none."""

    what: str
    value: str
    ratio: float | None = None
    target: float | None = None
    most: bool = False  # the target is an upper bound


def seconds(run: Callable[[], object], rounds: int = 20) -> float:
    """Median time on the device, by events, after a warm-up; on a CPU by its clock.

    The device is kept waiting until all of a round is queued: how long the host takes to launch does not count."""
    times, queued = [], 0.0
    for _ in range(3 if torch.cuda.is_available() else 1):
        synchronize()
        begin = time.perf_counter()
        run()
        queued = time.perf_counter() - begin
    for _ in range(rounds):
        if not torch.cuda.is_available():
            begin = time.perf_counter()
            run()
            times.append(time.perf_counter() - begin)
            continue
        torch.cuda._sleep(int(CYCLES * (1e-4 + 2 * queued)))  # type: ignore[no-untyped-call]
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return float(median(times))


def error(got: Tensor, expected: Tensor) -> float:
    """Relative norm; infinite if anything is not a number."""
    found = float((got.double() - expected.double()).norm() / expected.double().norm())
    return found if found == found else float("inf")


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


class Bench:
    """What all parts share. ``results`` holds figures of one part that another compares with."""

    def __init__(self, scale: Scale, device: torch.device) -> None:
        self.scale, self.device = scale, device
        self.results: dict[str, float] = {}
        self.kernels: Kernels = load_kernels(str(device), "triton")

    @cached_property
    def copy_rate(self) -> float:
        """Bytes a second, those read and those written."""
        source = torch.randint(0, 255, (self.scale.copy_bytes,), dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        return 2 * source.numel() / self.seconds(lambda: target.copy_(source))

    @cached_property
    def matrix_rate(self) -> float:
        """Operations a second of a large product on random data."""
        n = self.scale.matrix
        a, b = (torch.randn(n, n, dtype=self.scale.dtype, device=self.device) for _ in range(2))
        return 2 * n**3 / self.seconds(lambda: a @ b)

    def seconds(self, run: Callable[[], object]) -> float:
        return seconds(run, self.scale.rounds)

    def engine(self, **options: Any) -> Engine:
        """With random weights; the same in every process."""
        return make_engine(self.scale, self.device, **options)

    def paged(self, sequences: int, rows: int, context: int, block: int = 16) -> AttentionBatch:
        """``sequences`` alike whose blocks lie scattered over the pool."""
        blocks = -(-context // block)
        tables = torch.randperm(sequences * blocks).int().view(sequences, blocks)
        positions = torch.arange(context - rows, context).repeat(sequences)
        owners = torch.arange(sequences).repeat_interleave(rows)
        return AttentionBatch(
            positions=positions.to(self.device),
            slots=(tables[owners, positions // block].long() * block + positions % block).to(self.device),
            query_start=(torch.arange(sequences + 1, dtype=torch.int32) * rows).to(self.device),
            context_lens=torch.full((sequences,), context, dtype=torch.int32, device=self.device),
            block_tables=tables.to(self.device),
            num_decodes=sequences if rows == 1 else 0,
            max_query=rows,
            max_context=context,
        )


def ceilings(bench: Bench) -> Iterator[Line]:
    yield Line("device copy", f"{bench.copy_rate / 1e12:.2f} TB/s")
    yield Line("bf16 matrix product", f"{bench.matrix_rate / 1e12:.0f} TFLOP/s")


def make_engine(scale: Scale, device: torch.device, **options: Any) -> Engine:
    """On a CPU as on a GPU: steps ahead of their tokens, decode buckets."""
    dtype = str(scale.dtype).removeprefix("torch.")
    config = EngineConfig("random", device=str(device), dtype=dtype, enable_prefix_caching=False, **options)
    files, on_gpu = RandomFiles(scale.model, device), device.type == "cuda"
    standing_in = None if on_gpu else CpuDevice(asynchronous=True)
    kernels = None if on_gpu else load_kernels("cpu", "triton")
    return Engine(config, files, Runner(config, files, standing_in, kernels))
