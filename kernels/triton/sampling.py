"""One token for each row of logits, in one launch: temperature, min-p, top-k, top-p, and the draw.

Knows logits and five numbers a row. The filters need no sorting: each is a smallest logit that stays, and top-k
and top-p find theirs by trying 15 thresholds in one pass over the row, 4 bits at a time, on integers in the order
of the floats. Invariant: a row's token depends on that row alone and is below V, whatever the row holds.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.interface import SampleParams


@triton.jit
def _scaled(logits, temperature, V: tl.constexpr, start, COLUMNS: tl.constexpr):
    """A part of the row over the temperature; past its end the smallest number."""
    column = start + tl.arange(0, COLUMNS)
    x = tl.load(logits + column, mask=column < V, other=float("-inf"))
    return tl.div_rn(x, temperature + tl.zeros_like(x))


@triton.jit
def _ordered(x):
    """int64 in the order of the float32 ``x``, from 0."""
    bits = x.to(tl.int32, bitcast=True).to(tl.int64)
    return tl.where(bits < 0, -1 - bits, bits + 2147483648)


@triton.jit
def _threshold(
    logits, temperature, floor, top, wanted, V: tl.constexpr, COLUMNS: tl.constexpr, MASS: tl.constexpr
):  # fmt: skip
    """The largest key so that the row's values at or above it, and at or above the key ``floor``, reach
    ``wanted``: in number, or (MASS) in exp(value - top)."""
    found = tl.zeros([], tl.int64)
    tries = tl.arange(0, 16)
    for digit in tl.range(0, 8):
        step = (tl.full([], 1, tl.int64) << (28 - 4 * digit)).to(tl.int64)
        keys = found + tries * step  # [16]
        reached = tl.zeros([16], tl.float32)
        for start in tl.range(0, V, COLUMNS):
            x = _scaled(logits, temperature, V, start, COLUMNS)
            key = _ordered(x)
            inside = (key >= floor) & (start + tl.arange(0, COLUMNS) < V)
            value = tl.where(inside, 1.0, 0.0)
            if MASS:
                value *= tl.exp(tl.minimum(x - top, 0.0))
            reached += tl.sum(tl.where(key[None, :] >= keys[:, None], value[None, :], 0.0), 1)
        count = tl.sum((reached >= wanted).to(tl.int64), 0)
        found += tl.maximum(count - 1, 0) * step
    return found


@triton.jit
def _sample_kernel(
    logits_ptr, logits_row, temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, uniform_ptr, out_ptr,
    V: tl.constexpr, COLUMNS: tl.constexpr, TRIES: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    logits = logits_ptr + row.to(tl.int64) * logits_row
    temperature = tl.load(temperature_ptr + row)
    greedy = temperature == 0.0
    temperature = tl.where(greedy, 1.0, temperature)

    top = tl.full([], float("-inf"), tl.float32)
    best = tl.zeros([], tl.int32)
    for start in tl.range(0, V, COLUMNS):
        x = _scaled(logits, temperature, V, start, COLUMNS)
        x = tl.where(x == x, x, float("-inf"))
        part = tl.max(x, 0)
        column = start + tl.arange(0, COLUMNS)
        place = tl.min(tl.where(x == part, column, V - 1), 0)  # the first of equals
        best = tl.where(part > top, tl.minimum(place, V - 1), best)
        top = tl.maximum(top, part)

    token = best
    if (greedy == 0) & (top > float("-inf")) & (top < float("inf")):
        floor = tl.zeros([], tl.int64)
        min_p = tl.load(min_p_ptr + row)
        if min_p > 0.0:
            floor = tl.maximum(floor, _ordered(top + tl.log(min_p)))
        top_k = tl.load(top_k_ptr + row)
        if (top_k > 0) & (top_k < V):
            least = tl.zeros([], tl.int64)
            floor = tl.maximum(
                floor, _threshold(logits, temperature, least, top, top_k.to(tl.float32), V, TRIES, False)
            )
        top_p = tl.load(top_p_ptr + row)
        if top_p < 1.0:
            mass = tl.zeros([], tl.float32)
            for start in tl.range(0, V, COLUMNS):
                x = _scaled(logits, temperature, V, start, COLUMNS)
                inside = (_ordered(x) >= floor) & (start + tl.arange(0, COLUMNS) < V)
                mass += tl.sum(tl.where(inside, tl.exp(tl.minimum(x - top, 0.0)), 0.0), 0)
            floor = tl.maximum(floor, _threshold(logits, temperature, floor, top, top_p * mass, V, TRIES, True))

        mass64 = tl.zeros([], tl.float64)
        for start in tl.range(0, V, COLUMNS):
            x = _scaled(logits, temperature, V, start, COLUMNS)
            inside = (_ordered(x) >= floor) & (start + tl.arange(0, COLUMNS) < V)
            mass64 += tl.sum(tl.where(inside, tl.exp(tl.minimum(x - top, 0.0)), 0.0).to(tl.float64), 0)
        target = tl.load(uniform_ptr + row) * mass64
        before = tl.zeros([], tl.float64)
        below = tl.zeros([], tl.int32)  # tokens whose cumulative weight does not exceed the target
        last = best  # the last one with weight, where rounding leaves none above the target
        for start in tl.range(0, V, COLUMNS):
            column = start + tl.arange(0, COLUMNS)
            x = _scaled(logits, temperature, V, start, COLUMNS)
            inside = (_ordered(x) >= floor) & (column < V)
            weight = tl.where(inside, tl.exp(tl.minimum(x - top, 0.0)), 0.0).to(tl.float64)
            cumulative = before + tl.cumsum(weight, 0)
            below += tl.sum(((cumulative <= target) & (column < V)).to(tl.int32), 0)
            last = tl.maximum(last, tl.max(tl.where(weight > 0.0, column, 0), 0))
            before += tl.sum(weight, 0)
        token = tl.minimum(below, last)
    tl.store(out_ptr + row, token.to(tl.int64))


def sample(logits: Tensor, params: SampleParams) -> Tensor:
    """``logits [S, V]`` float32, rows dense -> ``[S]`` int64."""
    rows, vocab = logits.shape
    assert logits.dtype is torch.float32 and logits.stride(1) == 1
    out = torch.empty(rows, dtype=torch.int64, device=logits.device)
    if rows:
        columns = min(4096, triton.next_power_of_2(vocab))
        _sample_kernel[(rows,)](
            logits, logits.stride(0), params.temperature, params.top_k, params.top_p, params.min_p, params.uniform,
            out, V=vocab, COLUMNS=columns, TRIES=min(1024, columns), num_warps=8,
        )  # fmt: skip
    return out
