"""Batches of paged sequences for the kernel tests, and the same arithmetic in float64, written plainly."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels import AttentionBatch, pool_shape
from kernels.interface import UNSCALED, KvScales

LAYERS = 2
LAYER = 1  # the one that the tests use


@dataclass(frozen=True, slots=True)
class PagedCase:
    """A pool and one step on it. Every slot of the pool that no sequence's context holds is NaN."""

    batch: AttentionBatch
    kv: Tensor  # [blocks, Hkv, L, 2, B, D]
    q: Tensor  # [T, Hq, D], a view of qkv
    k: Tensor  # [T, Hkv, D], a view of qkv
    v: Tensor  # [T, Hkv, D], a view of qkv
    scale: float


def paged_case(
    sequences: Sequence[tuple[int, int]],  # (rows, context with these rows); those with one row first
    *,
    group: int = 3,
    kv_heads: int = 2,
    head_dim: int = 64,
    block_tokens: int = 16,
    dtype: torch.dtype = torch.float32,
    kv_dtype: torch.dtype | None = None,
    wider: int = 0,
) -> PagedCase:
    """Blocks in random order, in a pool with a few more blocks than needed. ``kv_dtype``: by default ``dtype``.
    ``wider``: the block tables are columns of so much wider ones, whose rest names no block."""
    needed = [-(-context // block_tokens) for _, context in sequences]
    num_blocks = sum(needed) + 3
    order = torch.randperm(num_blocks).tolist()
    columns = max(needed) + 1
    tables = torch.full((len(sequences), columns + wider), 1 << 30, dtype=torch.int32)
    tables = tables[:, wider // 2 : wider // 2 + columns].fill_(order[-1])
    kv = torch.full(pool_shape(num_blocks, kv_heads, LAYERS, block_tokens, head_dim), torch.nan).to(
        kv_dtype or dtype
    )
    positions: list[int] = []
    slots: list[int] = []
    for s, (rows, context) in enumerate(sequences):
        blocks = [order.pop(0) for _ in range(needed[s])]
        tables[s, : needed[s]] = torch.tensor(blocks, dtype=torch.int32)
        for i, block in enumerate(blocks):
            held = min(block_tokens, context - i * block_tokens)
            values = torch.randn(kv_heads, LAYERS, 2, held, head_dim)
            kv[block, :, :, :, :held] = values.to(kv_dtype or dtype)
        positions += range(context - rows, context)
        slots += [
            blocks[p // block_tokens] * block_tokens + p % block_tokens for p in range(context - rows, context)
        ]
    rows = [rows for rows, _ in sequences]
    starts = torch.tensor([0, *rows]).cumsum(0)
    batch = AttentionBatch(
        positions=torch.tensor(positions),
        slots=torch.tensor(slots),
        query_start=starts.int(),
        context_lens=torch.tensor([context for _, context in sequences], dtype=torch.int32),
        block_tables=tables,
        num_decodes=next((i for i, n in enumerate(rows) if n > 1), len(rows)),
        max_query=max(rows),
        max_context=max(context for _, context in sequences),
    )
    heads = kv_heads * group
    qkv = torch.randn(sum(rows), (heads + 2 * kv_heads) * head_dim).to(dtype)
    q, k, v = qkv.split([heads * head_dim, kv_heads * head_dim, kv_heads * head_dim], dim=1)
    return PagedCase(
        batch=batch,
        kv=kv,
        q=q.unflatten(1, (heads, head_dim)),
        k=k.unflatten(1, (kv_heads, head_dim)),
        v=v.unflatten(1, (kv_heads, head_dim)),
        scale=head_dim**-0.5,
    )


def exact_attention(
    case: PagedCase,
    window: int | None = None,
    soft_cap: float | None = None,
    kv_scales: KvScales = UNSCALED,
) -> Tensor:
    """``[T, Hq * D]`` float64, a row at a time."""
    batch, kv = case.batch, case.kv
    block_tokens, group = kv.shape[4], case.q.shape[1] // kv.shape[1]
    out = torch.empty(case.q.shape, dtype=torch.float64)
    for s, context in enumerate(batch.context_lens.tolist()):
        table = batch.block_tables[s, : -(-context // block_tokens)].long()
        tiles = kv[table, :, LAYER].double().permute(2, 1, 0, 3, 4).flatten(2, 3)  # [2, Hkv, tokens, D]
        keys, values = tiles.repeat_interleave(group, dim=1)
        for row in range(int(batch.query_start[s]), int(batch.query_start[s + 1])):
            stop = int(batch.positions[row]) + 1
            seen = slice(0 if window is None else max(0, stop - window), stop)
            scores = torch.einsum("hd,htd->ht", case.q[row].double(), keys[:, seen] * kv_scales.k) * case.scale
            if soft_cap is not None:
                scores = soft_cap * torch.tanh(scores / soft_cap)
            out[row] = torch.einsum("ht,htd->hd", scores.softmax(-1), values[:, seen] * kv_scales.v)
    return out.flatten(1)


def exact_rope(x: Tensor, cos_sin: Tensor, positions: Tensor) -> Tensor:
    """``x [T, H, D]`` rotated, float64."""
    cosine, sine = cos_sin[positions].double().unsqueeze(1).chunk(2, dim=-1)
    first, second = x.double().chunk(2, dim=-1)
    return torch.cat((first * cosine - second * sine, second * cosine + first * sine), dim=-1)


def exact_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.double()
    return wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps) * weight.double()
