"""Rotary positions and the write of K and V to the pool, in one launch.

Knows rows, slots and one layer of the pool. Invariant: writes q and k in place and the slots of its rows, no
other byte of the pool.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.interface import UNSCALED, KvScales

HEADS = 4  # of one row, by one program


@triton.jit
def _to_pool(x, inverse_scale, kv_ptr):
    """In the pool's type; float8 has no infinity, so what is too large becomes its largest value."""
    if kv_ptr.dtype.element_ty == tl.float8e4nv:
        x = tl.minimum(tl.maximum(x.to(tl.float32) * inverse_scale, -448.0), 448.0)
    return x.to(kv_ptr.dtype.element_ty)


@triton.jit
def _rope_kernel(
    q_ptr, q_row, q_head, k_ptr, k_row, k_head, v_ptr, v_row, v_head,
    cos_sin_ptr, cos_sin_row, positions_ptr, slots_ptr,
    kv_ptr, kv_block, kv_head, kv_value, kv_token, k_inverse, v_inverse,
    QUERY_HEADS: tl.constexpr, KV_HEADS: tl.constexpr, BLOCK_TOKENS: tl.constexpr, HALF_DIM: tl.constexpr,
    HALF: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    QUERY_PARTS: tl.constexpr = (QUERY_HEADS + HEADS - 1) // HEADS
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    dims = tl.arange(0, HALF)
    known = dims < HALF_DIM
    angles = cos_sin_ptr + tl.load(positions_ptr + row) * cos_sin_row + dims
    cos = tl.load(angles, mask=known, other=0.0)[None, :]
    sin = tl.load(angles + HALF_DIM, mask=known, other=0.0)[None, :]
    if part < QUERY_PARTS:
        heads = part * HEADS + tl.arange(0, HEADS)
        inside = (heads < QUERY_HEADS)[:, None] & known[None, :]
        ptrs = q_ptr + row * q_row + heads[:, None] * q_head + dims[None, :]
    else:
        heads = (part - QUERY_PARTS) * HEADS + tl.arange(0, HEADS)
        inside = (heads < KV_HEADS)[:, None] & known[None, :]
        ptrs = k_ptr + row * k_row + heads[:, None] * k_head + dims[None, :]
    x = tl.load(ptrs, mask=inside, other=0.0).to(tl.float32)
    y = tl.load(ptrs + HALF_DIM, mask=inside, other=0.0).to(tl.float32)
    first = (x * cos - y * sin).to(q_ptr.dtype.element_ty)
    second = (y * cos + x * sin).to(q_ptr.dtype.element_ty)
    tl.store(ptrs, first, mask=inside)
    tl.store(ptrs + HALF_DIM, second, mask=inside)
    if part >= QUERY_PARTS:
        slot = tl.load(slots_ptr + row)
        target = kv_ptr + (slot // BLOCK_TOKENS) * kv_block + (slot % BLOCK_TOKENS) * kv_token
        target += heads[:, None] * kv_head + dims[None, :]
        tl.store(target, _to_pool(first, k_inverse, kv_ptr), mask=inside)
        tl.store(target + HALF_DIM, _to_pool(second, k_inverse, kv_ptr), mask=inside)
        v_ptrs = v_ptr + row * v_row + heads[:, None] * v_head + dims[None, :]
        target += kv_value
        tl.store(target, _to_pool(tl.load(v_ptrs, mask=inside), v_inverse, kv_ptr), mask=inside)
        rest = tl.load(v_ptrs + HALF_DIM, mask=inside)
        tl.store(target + HALF_DIM, _to_pool(rest, v_inverse, kv_ptr), mask=inside)


def rope_kv_write(
    q: Tensor, k: Tensor, v: Tensor, cos_sin: Tensor, kv: Tensor, layer: int, positions: Tensor, slots: Tensor,
    kv_scales: KvScales = UNSCALED,
) -> None:  # fmt: skip
    """``q [T, Hq, D]``, ``k, v [T, Hkv, D]``, heads dense; ``cos_sin [positions, D]`` float32; ``positions, slots
    [T]`` int64; ``kv [blocks, Hkv, L, 2, B, D]``."""
    rows, heads, head_dim = q.shape
    kv_heads = k.shape[1]
    assert q.stride(2) == k.stride(2) == v.stride(2) == cos_sin.stride(1) == 1
    assert cos_sin.dtype is torch.float32 and q.dtype is k.dtype
    strides = kv.stride()
    if rows:
        _rope_kernel[(rows, triton.cdiv(heads, HEADS) + triton.cdiv(kv_heads, HEADS))](
            q, q.stride(0), q.stride(1), k, k.stride(0), k.stride(1), v, v.stride(0), v.stride(1),
            cos_sin, cos_sin.stride(0), positions, slots,
            kv[:, :, layer], strides[0], strides[1], strides[3], strides[4], 1 / kv_scales.k, 1 / kv_scales.v,
            QUERY_HEADS=heads, KV_HEADS=kv_heads, BLOCK_TOKENS=kv.shape[4], HALF_DIM=head_dim // 2,
            HALF=triton.next_power_of_2(head_dim // 2), HEADS=HEADS, num_warps=1 if head_dim <= 64 else 2,
        )  # fmt: skip
