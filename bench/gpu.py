"""Checks and times the GPU path in one call of at most eight minutes: ``python -m bench.gpu [--out FILE]``.

Every ratio is against a ceiling that the same call measures: a copy on the device, a matrix product, or another
library on the same data. A part that fails prints its traceback and the others go on; a part whose package is
missing says so. Medians of repeated runs.
"""

from __future__ import annotations

import argparse
import json
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.gpu_model import LLAMA_3_8B, RandomFiles
from engine import EngineConfig, EngineRequest, SamplingParams
from engine.core import Engine
from kernels import AttentionBatch, ReferenceKernels, load_kernels, pool_shape

HEADS, KV_HEADS, HEAD_DIM, BLOCK = 32, 8, 128, 16
DTYPE = torch.bfloat16
SECONDS = 450.0  # of the whole call; later parts are left out


@dataclass(frozen=True, slots=True)
class Line:
    """One row of the table. ``ratio`` and ``target``: None where there is none."""

    what: str
    value: str
    ratio: float | None = None
    target: float | None = None
    most: bool = False  # the target is an upper bound


def seconds(run: Callable[[], object], rounds: int = 20) -> float:
    """Median time on the device, by events, after a warm-up."""
    for _ in range(3):
        run()
    times = []
    for _ in range(rounds):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return float(median(times))


def paged(sequences: int, rows: int, context: int) -> AttentionBatch:
    """``sequences`` alike whose blocks lie scattered over the pool; on the GPU."""
    blocks = -(-context // BLOCK)
    tables = torch.randperm(sequences * blocks).int().view(sequences, blocks)
    positions = torch.arange(context - rows, context).repeat(sequences)
    owners = torch.arange(sequences).repeat_interleave(rows)
    return AttentionBatch(
        positions=positions.cuda(),
        slots=(tables[owners, positions // BLOCK].long() * BLOCK + positions % BLOCK).cuda(),
        query_start=(torch.arange(sequences + 1, dtype=torch.int32) * rows).cuda(),
        context_lens=torch.full((sequences,), context, dtype=torch.int32).cuda(),
        block_tables=tables.cuda(),
        num_decodes=sequences if rows == 1 else 0,
        max_query=rows,
        max_context=context,
    )


def contiguous(kv: Tensor, batch: AttentionBatch) -> tuple[Tensor, Tensor]:
    """K and V of layer 0 as ``[S, Hkv, tokens, D]``."""
    tiles = kv[batch.block_tables.long(), :, 0].permute(3, 0, 2, 1, 4, 5)  # [2, S, Hkv, blocks, B, D]
    k, v = tiles.flatten(3, 4).contiguous()
    return k, v


def error(got: Tensor, expected: Tensor) -> float:
    """Relative norm; infinite if anything is not finite."""
    found = float((got.double() - expected.double()).norm() / expected.double().norm())
    return found if found == found else float("inf")


class Bench:
    """Ceilings are measured once, at their first use."""

    def __init__(self) -> None:
        self.device = torch.device("cuda", 0)
        self.kernels = load_kernels("cuda:0")

    @cached_property
    def copy_rate(self) -> float:
        """Bytes a second, those read and those written."""
        source = torch.randint(0, 255, (4 << 30,), dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        return 2 * source.numel() / seconds(lambda: target.copy_(source))

    @cached_property
    def matrix_rate(self) -> float:
        """Operations a second of a large bf16 product on random data."""
        a, b = (torch.randn(8192, 8192, dtype=DTYPE, device=self.device) for _ in range(2))
        return 2 * 8192**3 / seconds(lambda: a @ b)

    def ceilings(self) -> list[Line]:
        return [
            Line("device copy", f"{self.copy_rate / 1e12:.2f} TB/s"),
            Line("bf16 matrix product", f"{self.matrix_rate / 1e12:.0f} TFLOP/s"),
        ]

    def decode_attention(self) -> list[Line]:
        sequences, context, layers = 64, 4096, 2
        batch = paged(sequences, 1, context)
        kv = torch.randn(
            pool_shape(batch.block_tables.numel(), KV_HEADS, layers, BLOCK, HEAD_DIM), dtype=DTYPE, device="cuda"
        )
        q = torch.randn(sequences, HEADS, HEAD_DIM, dtype=DTYPE, device="cuda")
        scale = HEAD_DIM**-0.5
        got = self.kernels.paged_attention(q, kv, 0, batch, scale)
        wrong = error(got, ReferenceKernels().paged_attention(q.float(), kv.float(), 0, batch, scale))
        run = lambda: [self.kernels.paged_attention(q, kv, i, batch, scale) for i in range(layers)]  # noqa: E731
        taken = seconds(run) / layers
        rate = sequences * context * KV_HEADS * HEAD_DIM * 4 / taken
        k, v = (
            kv[batch.block_tables.long(), :, 0, i].permute(0, 2, 1, 3, 4).flatten(2, 3).contiguous()
            for i in (0, 1)
        )
        gathered = seconds(lambda: F.scaled_dot_product_attention(q.unsqueeze(2), k, v, enable_gqa=True))
        return [
            Line("decode attention, error", f"{wrong:.1e}", wrong, 1e-2, most=True),
            Line("decode attention, 64 x 4k / copy", f"{taken * 1e6:.0f} us", rate / self.copy_rate, 0.85),
            Line("the same / torch SDPA, gathered KV", f"{gathered * 1e6:.0f} us", gathered / taken, 2.0),
            *self._flashinfer(q, k, v, taken),
        ]

    def _flashinfer(self, q: Tensor, k: Tensor, v: Tensor, taken: float) -> list[Line]:
        try:
            import flashinfer
        except ImportError:
            return [Line("the same / FlashInfer", "skipped: flashinfer is not installed")]
        sequences, context = k.shape[0], k.shape[2]
        pages = sequences * context // BLOCK
        cache = torch.stack((k, v), 1).view(sequences, 2, KV_HEADS, -1, BLOCK, HEAD_DIM)
        cache = cache.permute(0, 3, 1, 2, 4, 5).flatten(0, 1).contiguous()  # HND
        wrapper: Any = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
            torch.empty(256 << 20, dtype=torch.uint8, device="cuda"), "HND", use_tensor_cores=True
        )
        wrapper.plan(
            torch.arange(sequences + 1, dtype=torch.int32, device="cuda") * (context // BLOCK),
            torch.arange(pages, dtype=torch.int32, device="cuda"),
            torch.full((sequences,), BLOCK, dtype=torch.int32, device="cuda"),
            HEADS, KV_HEADS, HEAD_DIM, BLOCK, q_data_type=DTYPE, kv_data_type=DTYPE,
        )  # fmt: skip
        theirs = seconds(lambda: wrapper.run(q, cache))
        return [Line("the same / FlashInfer", f"{theirs * 1e6:.0f} us", theirs / taken, 1.0)]

    def prefill_attention(self) -> list[Line]:
        lines = []
        for sequences in (1, 8):
            rows = 8192 // sequences
            batch = paged(sequences, rows, rows)
            shape = pool_shape(batch.block_tables.numel(), KV_HEADS, 1, BLOCK, HEAD_DIM)
            kv = torch.randn(shape, dtype=DTYPE, device="cuda")
            q = torch.randn(8192, HEADS, HEAD_DIM, dtype=DTYPE, device="cuda")
            k, v = contiguous(kv, batch)
            dense = q.view(sequences, rows, HEADS, HEAD_DIM).transpose(1, 2).contiguous()
            wide_k, wide_v = (x.repeat_interleave(HEADS // KV_HEADS, dim=1) for x in (k, v))

            def flash(q: Tensor = dense, k: Tensor = wide_k, v: Tensor = wide_v) -> Tensor:
                with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION):
                    return F.scaled_dot_product_attention(q, k, v, is_causal=True)

            def ours(q: Tensor = q, kv: Tensor = kv, batch: AttentionBatch = batch) -> Tensor:
                return self.kernels.paged_attention(q, kv, 0, batch, HEAD_DIM**-0.5)

            wrong = error(ours(), flash().transpose(1, 2).reshape(8192, -1))
            taken, theirs = seconds(ours), seconds(flash)
            name = f"prefill attention, 8k tokens, {sequences} sequences"
            lines.append(Line(f"{name}, error", f"{wrong:.1e}", wrong, 1e-2, most=True))
            lines.append(Line(f"{name} / flash SDPA", f"{taken * 1e3:.2f} ms", theirs / taken, 0.8))
        return lines

    def steps(self) -> list[Line]:
        """The engine with random weights: decode, prefill, and how long the GPU waits for Python."""
        files = RandomFiles(LLAMA_3_8B, self.device)
        config = EngineConfig(
            "random", device="cuda", max_num_seqs=128, max_num_batched_tokens=8192, gpu_memory_utilization=0.85,
            enable_prefix_caching=False,
        )  # fmt: skip
        engine = Engine(config, files)
        engine.warm_up()
        lines, context = [], 1024
        for sequences in (1, 32, 128):
            wall, _ = decode(engine, sequences, context)
            held = sequences * context * engine.runner.layout.token_bytes
            rate = (files.weight_bytes() + held) / wall  # bytes that must be read, a second
            name = f"decode step, {sequences} sequences, / copy"
            lines.append(
                Line(name, f"{wall * 1e3:.2f} ms, {sequences / wall:.0f} tokens/s", rate / self.copy_rate, 0.8)
            )
        wall, busy = decode(engine, 64, context)
        lines.append(
            Line("GPU idle in a decode step, 64 sequences", f"{wall * 1e3:.2f} ms", 1 - busy / wall, 0.03, True)
        )
        taken = prefill(engine, 8192)
        c = LLAMA_3_8B
        products = (
            2
            * 8192
            * c.num_layers
            * sum(n * k for name, (n, k) in files._shapes.items() if name.endswith("_proj"))
        )
        attention = 4 * c.num_layers * HEADS * HEAD_DIM * 8192 * 8193 // 2
        rate = (products + attention) / taken
        lines.append(
            Line("prefill step, 8k tokens / matrix product", f"{taken * 1e3:.0f} ms", rate / self.matrix_rate, 0.7)
        )
        return lines

    def not_there(self) -> list[Line]:
        names = ("KV of 8k tokens between two processes", "ITL p99, two workers on one GPU", "transformers' speed")
        return [Line(name, "not measured: this script does not have it yet") for name in names]


def decode(engine: Engine, sequences: int, context: int, steps: int = 40) -> tuple[float, float]:
    """Median wall time between steps of ``sequences`` decodes, and the time that the GPU is busy in one."""
    greedy = SamplingParams(temperature=0, max_tokens=steps + 24, ignore_eos=True)
    generator = torch.Generator().manual_seed(sequences)
    for i in range(sequences):
        tokens = torch.randint(0, engine.vocab_size, (context,), generator=generator).tolist()
        engine.add(EngineRequest(f"decode-{i}", tokens, greedy))
    while len(engine.scheduler.running) < sequences or any(s.remaining > 1 for s in engine.scheduler.running):
        engine.step()
    for _ in range(8):
        engine.step()
    walls = []
    for _ in range(steps // 2):
        start = time.perf_counter()
        engine.step()
        walls.append(time.perf_counter() - start)
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        for _ in range(8):
            engine.step()
        torch.cuda.synchronize()
    busy = sum(e.self_device_time_total for e in profile.key_averages()) / 1e6 / 8
    while engine.has_work:
        engine.step()
    return median(walls), busy


def prefill(engine: Engine, tokens: int, rounds: int = 4) -> float:
    """Median wall time of a step that reads a prompt of so many tokens."""
    walls = []
    for i in range(rounds):
        ids = torch.randint(0, engine.vocab_size, (tokens,)).tolist()
        engine.add(EngineRequest(f"prefill-{i}", ids, SamplingParams(temperature=0, max_tokens=1)))
        torch.cuda.synchronize()
        start = time.perf_counter()
        while engine.has_work:
            engine.step()
        walls.append(time.perf_counter() - start)
    return median(walls)


def show(lines: list[Line]) -> None:
    print(f"\n{'what':<52}{'measured':<34}{'ratio':>8}{'target':>9}")
    for line in lines:
        ratio = "" if line.ratio is None else f"{line.ratio:.3g}"
        target = "" if line.target is None else f"{'<=' if line.most else '>='} {line.target:g}"
        print(f"{line.what:<52}{line.value:<34}{ratio:>8}{target:>9}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="file for the table as JSON")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("no GPU here: nothing was measured")
    began, bench, lines = time.monotonic(), Bench(), list[Line]()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, kernels: {bench.kernels.name}", flush=True)
    for part in (bench.ceilings, bench.decode_attention, bench.prefill_attention, bench.steps, bench.not_there):
        name = part.__name__
        if time.monotonic() - began > SECONDS:
            lines.append(Line(name, "left out: no time"))
            continue
        try:
            with torch.inference_mode():
                lines += part()
        except Exception:  # the other parts are worth having
            traceback.print_exc()
            lines.append(Line(name, "failed: see the traceback"))
        torch.cuda.empty_cache()
        print(f"{name}: {time.monotonic() - began:.0f} s", flush=True)
    show(lines)
    if options.out is not None:
        options.out.write_text(json.dumps([asdict(line) for line in lines], indent=1))


if __name__ == "__main__":
    main()
