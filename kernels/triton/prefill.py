"""Paged attention for chunks: many queries a sequence, causal, over what the pool holds of it.

One launch serves chunks of any lengths. A program takes the queries of one KV head's group for a run of tokens,
as rows of one tile, and goes over the context once; the longest work starts first.

Knows one layer's tiles and the batch's tables. Invariant: rows of a sequence are its last ones, so row ``i`` of
``n`` stands at position ``context - n + i``.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from kernels.interface import UNSCALED, KvScales
from kernels.triton.softmax import attend
from kernels.triton.tuning import VARYING, Cut, padded_sequences


@triton.jit(do_not_specialize=["num_sequences", "table_row"], do_not_specialize_on_alignment=VARYING)
def _prefill_kernel(
    q_ptr, q_row, q_head,
    kv_ptr, kv_block, kv_head, kv_value, kv_token,
    tables_ptr, table_row, starts_ptr, contexts_ptr, num_sequences,
    out_ptr, out_row,
    scale, v_scale,
    SEQUENCES: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr, HEAD_DIM: tl.constexpr, DIM: tl.constexpr, TOKENS: tl.constexpr,
    WINDOW: tl.constexpr, SOFT_CAP: tl.constexpr, WIDE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    QUERIES: tl.constexpr = ROWS // GROUP
    place = tl.num_programs(0) - 1 - tl.program_id(0)
    head = tl.program_id(1)
    sequences = tl.arange(0, SEQUENCES)
    known = sequences < num_sequences
    starts = tl.load(starts_ptr + sequences, mask=known, other=0)
    counts = tl.load(starts_ptr + sequences + 1, mask=known, other=0) - starts
    tiles = tl.cdiv(counts, QUERIES)
    ends = tl.cumsum(tiles, 0)
    sequence = tl.sum((ends <= place).to(tl.int32), 0)
    if sequence >= num_sequences:
        return  # the grid is a bound
    mine = sequences == sequence
    tile = place - tl.sum(tl.where(mine, ends - tiles, 0), 0)
    start = tl.sum(tl.where(mine, starts, 0), 0)
    count = tl.sum(tl.where(mine, counts, 0), 0)
    context = tl.load(contexts_ptr + sequence)

    rows, dims = tl.arange(0, ROWS), tl.arange(0, DIM)
    query = tile * QUERIES + rows // GROUP
    valid = (query < count) & (rows < QUERIES * GROUP)
    inside = valid[:, None] & (dims < HEAD_DIM)[None, :]
    heads = head * GROUP + rows % GROUP
    row = (start + query).to(tl.int64)
    q = tl.load(q_ptr + (row * q_row + heads * q_head)[:, None] + dims[None, :], mask=inside, other=0.0)

    earliest = context - count + tile * QUERIES  # position of the tile's first query
    positions = context - count + query
    seen = tl.minimum(earliest + QUERIES, context)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, DIM], tl.float32)
    tile_ptr = kv_ptr + head * kv_head
    table_ptr = tables_ptr + sequence.to(tl.int64) * table_row
    if WINDOW is not None:
        masked = tl.maximum(earliest - WINDOW + 1, 0) // TOKENS * TOKENS
    else:
        masked = (earliest + 1) // TOKENS * TOKENS  # all rows see the tokens before
        top, total, acc = attend(
            top, total, acc, q, positions, tile_ptr, kv_block, kv_value, kv_token, table_ptr, 0, masked, seen,
            scale, BLOCK_TOKENS, HEAD_DIM, DIM, TOKENS, WINDOW, SOFT_CAP, False, WIDE, STAGES,
        )  # fmt: skip
    top, total, acc = attend(
        top, total, acc, q, positions, tile_ptr, kv_block, kv_value, kv_token, table_ptr, masked, seen, seen,
        scale, BLOCK_TOKENS, HEAD_DIM, DIM, TOKENS, WINDOW, SOFT_CAP, True, WIDE, STAGES,
    )  # fmt: skip
    out = out_ptr + (row * out_row + heads * HEAD_DIM)[:, None] + dims[None, :]
    tl.store(out, (acc * v_scale / total[:, None]).to(out_ptr.dtype.element_ty), mask=inside)


def prefill(
    q: Tensor,
    kv: Tensor,
    layer: int,
    block_tables: Tensor,
    query_start: Tensor,
    context_lens: Tensor,
    scale: float,
    out: Tensor,
    num_rows: int,
    cut: Cut,
    window: int | None = None,
    soft_cap: float | None = None,
    kv_scales: KvScales = UNSCALED,
) -> None:
    """``q [T, Hq, D]``; S tables and contexts, ``query_start [S + 1]`` into q and ``out [T, Hq * D]``, which is
    filled there: ``num_rows`` rows in all. ``kv [blocks, Hkv, L, 2, B, D]``."""
    heads, head_dim = q.shape[1:]
    kv_heads, block_tokens = kv.shape[1], kv.shape[4]
    group, sequences = heads // kv_heads, context_lens.shape[0]
    strides = kv.stride()
    scale *= kv_scales.k
    tiles = num_rows // (cut.rows // group) + sequences  # never fewer than there are
    _prefill_kernel[(tiles, kv_heads)](
        q, q.stride(0), q.stride(1),
        kv[:, :, layer], strides[0], strides[1], strides[3], strides[4],
        block_tables, block_tables.stride(0), query_start, context_lens, sequences,
        out, out.stride(0), scale if soft_cap is not None else scale * 1.4426950408889634, kv_scales.v,
        SEQUENCES=padded_sequences(sequences), GROUP=group, ROWS=cut.rows,
        BLOCK_TOKENS=block_tokens, HEAD_DIM=head_dim, DIM=max(16, triton.next_power_of_2(head_dim)),
        TOKENS=cut.tokens, WINDOW=window, SOFT_CAP=soft_cap,
        WIDE=triton.knobs.runtime.interpret, STAGES=cut.stages,
        num_warps=cut.warps,
    )  # fmt: skip
