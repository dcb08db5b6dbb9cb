"""Measures cuts of the attention kernels on the GPU that is here and keeps the fastest in the device's file.

    python -m kernels.triton.tune --heads 32 --kv-heads 8 --head-dim 128 [--block-tokens 16] [--dtype bfloat16]

Knows what the kernels are called with, not how they work. Invariant: a cut that a shape cannot run with is left
out, and what is kept was faster than the rule of `kernels.triton.tuning` in the same call.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterable
from dataclasses import astuple, replace
from pathlib import Path

import torch
import triton

from kernels.interface import AttentionBatch, AttentionShape, pool_shape
from kernels.triton.backend import TritonKernels, shape_of
from kernels.triton.tuning import FOLDER, Cut, Device, Shape, Tuning, default_decode, default_prefill

# Seconds of "decode" or "prefill" with a cut; infinite if it does not fit the device.
Measure = Callable[[str, Cut], float]


def candidates(kernel: str, device: Device, shape: Shape) -> list[Cut]:
    """The rule's cut first, then others, the more like it the earlier."""
    first = (default_decode if kernel == "decode" else default_prefill)(device, shape)
    cuts = [first]
    for tokens in (32, 64, 128):
        for warps in (4, 8):
            for stages in (2, 3, 4):
                if kernel == "decode":
                    cuts += [Cut(tokens, first.rows, programs, warps, stages) for programs in (1, 2, 3)]
                else:
                    cuts += [Cut(tokens, rows, 1, warps, stages) for rows in (64, 128) if rows >= shape.group]

    def distance(cut: Cut) -> float:
        pairs = zip(astuple(cut), astuple(first), strict=True)
        return sum(abs(math.log2(mine / its)) for mine, its in pairs)

    return sorted(dict.fromkeys(cuts), key=distance)


def fastest(kernel: str, cuts: Iterable[Cut], measure: Measure) -> tuple[Cut, float]:
    """The best of ``cuts``, and its seconds."""
    times = {cut: measure(kernel, cut) for cut in cuts}
    best = min(times, key=lambda cut: times[cut])
    return best, times[best]


def tune(tuning: Tuning, shape: AttentionShape, measure: Measure, most: int | None = None) -> dict[str, float]:
    """Adds the fastest cuts for ``shape`` to ``tuning``; seconds by kernel. ``most``: cuts to try of each."""
    known, seconds = shape_of(shape), {}
    for kernel in ("decode", "prefill"):
        cut, seconds[kernel] = fastest(kernel, candidates(kernel, tuning.device, known)[:most], measure)
        tuning.keep(kernel, known, cut)
    return seconds


def measure_on_gpu(device: Device, shape: AttentionShape, sequences: int = 64, context: int = 4096) -> Measure:
    """Decodes of ``sequences`` and a prefill of ``context`` tokens, median of repeated runs."""
    blocks = context // shape.block_tokens
    kv = torch.randn(
        pool_shape(sequences * blocks, shape.num_kv_heads, 1, shape.block_tokens, shape.head_dim),
        dtype=shape.dtype, device="cuda",
    ).to(shape.kv_dtype)  # fmt: skip
    batches = {"decode": _batch(sequences, 1, context, blocks), "prefill": _batch(1, context, context, blocks)}

    def measure(kernel: str, cut: Cut) -> float:
        tuning, batch = Tuning(device), batches[kernel]
        tuning.keep(kernel, shape_of(shape), cut)
        kernels = TritonKernels("cuda", tuning)
        rows = batch.positions.shape[0]
        q = torch.randn(rows, shape.num_heads, shape.head_dim, dtype=shape.dtype, device="cuda")
        run = lambda: kernels.paged_attention(q, kv, 0, batch, shape.head_dim**-0.5)  # noqa: E731
        run()
        if getattr(tuning, kernel)(shape_of(shape)) != cut:
            return math.inf  # a smaller one ran in its place
        return float(triton.testing.do_bench(run, warmup=5, rep=30, return_mode="median")) / 1e3

    return measure


def _batch(sequences: int, rows: int, context: int, blocks: int) -> AttentionBatch:
    tables = torch.randperm(sequences * blocks, dtype=torch.int32).view(sequences, blocks)
    positions = torch.arange(context - rows, context).repeat(sequences)
    return AttentionBatch(
        positions=positions.cuda(),
        slots=torch.zeros_like(positions).cuda(),  # attention writes nothing
        query_start=(torch.arange(sequences + 1, dtype=torch.int32) * rows).cuda(),
        context_lens=torch.full((sequences,), context, dtype=torch.int32).cuda(),
        block_tables=tables.cuda(),
        num_decodes=sequences if rows == 1 else 0,
        max_query=rows,
        max_context=context,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("--heads", 32), ("--kv-heads", 8), ("--head-dim", 128), ("--block-tokens", 16)):
        parser.add_argument(name, type=int, default=default)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--fp8-kv", action="store_true")
    parser.add_argument("--folder", type=Path, default=FOLDER)
    options = parser.parse_args()
    dtype: torch.dtype = getattr(torch, options.dtype)
    shape = AttentionShape(options.heads, options.kv_heads, options.head_dim, options.block_tokens, dtype, dtype)
    if options.fp8_kv:
        shape = replace(shape, kv_dtype=torch.float8_e4m3fn)
    device = Device.cuda(torch.device("cuda", 0))
    tuning = Tuning.load(device, options.folder)
    for kernel, seconds in tune(tuning, shape, measure_on_gpu(device, shape)).items():
        print(f"{kernel}: {seconds * 1e6:.0f} us")
    print(f"kept in {tuning.save(options.folder)}")


if __name__ == "__main__":
    main()
