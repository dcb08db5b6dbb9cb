"""Paged attention for decodes: one query a sequence, the whole batch's tokens divided evenly among programs.

All (sequence, KV head) pairs laid end to end make one row of token tiles. Each program takes an equal share of
it, however long the sequences are, and leaves one partial result for each pair that it met; a second kernel
merges those of a pair. So the grid depends on the device alone, which suits CUDA graphs, and ragged batches
fill the device as even ones do. The idea is Stream-K's (https://arxiv.org/abs/2301.03598).

Knows one layer's tiles and the batch's tables. Invariant: partial ``pair + program`` belongs to one pair and
one program, because along the row each step to the next partial raises one of the two.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.interface import UNSCALED, KvScales
from kernels.triton.softmax import attend
from kernels.triton.tuning import VARYING, Cut, padded_sequences


@triton.jit
def _first_token(context, TOKENS: tl.constexpr, WINDOW: tl.constexpr):
    """The first token of the first tile that a row at the end of ``context`` needs."""
    first = context * 0
    if WINDOW is not None:
        first = tl.maximum(context - WINDOW, 0) // TOKENS * TOKENS
    return first


@triton.jit
def _row_of_tiles(
    contexts_ptr, num_sequences,
    SEQUENCES: tl.constexpr, KV_HEADS: tl.constexpr, TOKENS: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """Tiles of one head and end in the row of each sequence, ``[SEQUENCES]``, and the row's length."""
    sequences = tl.arange(0, SEQUENCES)
    contexts = tl.load(contexts_ptr + sequences, mask=sequences < num_sequences, other=0)
    tiles = tl.cdiv(contexts - _first_token(contexts, TOKENS, WINDOW), TOKENS)
    return tiles, tl.cumsum(tiles * KV_HEADS, 0), tl.sum(tiles * KV_HEADS, 0)


@triton.jit(do_not_specialize=["num_sequences", "table_row"], do_not_specialize_on_alignment=VARYING)
def _decode_kernel(
    q_ptr, q_row, q_head,
    kv_ptr, kv_block, kv_head, kv_value, kv_token,
    tables_ptr, table_row, contexts_ptr, num_sequences,
    acc_ptr, top_ptr, total_ptr,  # [partials, GROUP, HEAD_DIM], [partials, GROUP] twice
    scale,
    SEQUENCES: tl.constexpr, KV_HEADS: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr, HEAD_DIM: tl.constexpr, DIM: tl.constexpr, TOKENS: tl.constexpr,
    WINDOW: tl.constexpr, SOFT_CAP: tl.constexpr, WIDE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    tiles, ends, length = _row_of_tiles(contexts_ptr, num_sequences, SEQUENCES, KV_HEADS, TOKENS, WINDOW)
    share = tl.cdiv(length, tl.num_programs(0))
    place = program * share
    left = tl.minimum(length - place, share)  # tiles still to do; none or less: the row is shorter
    sequence = tl.sum((ends <= place).to(tl.int32), 0)
    mine = tl.arange(0, SEQUENCES) == sequence
    own_tiles = tl.maximum(tl.sum(tl.where(mine, tiles, 0), 0), 1)
    place -= tl.sum(tl.where(mine, ends, 0), 0) - own_tiles * KV_HEADS
    pair = sequence * KV_HEADS + place // own_tiles
    tile = place % own_tiles

    members, dims = tl.arange(0, ROWS), tl.arange(0, DIM)
    inside = (members < GROUP)[:, None] & (dims < HEAD_DIM)[None, :]
    while left > 0:
        sequence = pair // KV_HEADS
        head = pair % KV_HEADS
        context = tl.load(contexts_ptr + sequence)
        first = _first_token(context, TOKENS, WINDOW)
        count = tl.minimum(tl.cdiv(context - first, TOKENS) - tile, left)
        rows = q_ptr + sequence.to(tl.int64) * q_row + (head * GROUP + members)[:, None] * q_head
        q = tl.load(rows + dims[None, :], mask=inside, other=0.0)
        begin = first + tile * TOKENS
        top, total, acc = attend(
            tl.full([ROWS], float("-inf"), tl.float32), tl.zeros([ROWS], tl.float32),
            tl.zeros([ROWS, DIM], tl.float32), q, tl.zeros([ROWS], tl.int32) + (context - 1),
            kv_ptr + head * kv_head, kv_block, kv_value, kv_token, tables_ptr + sequence.to(tl.int64) * table_row,
            begin, tl.minimum(begin + count * TOKENS, context), context, scale,
            BLOCK_TOKENS, HEAD_DIM, DIM, TOKENS, WINDOW, SOFT_CAP, True, WIDE, STAGES,
        )  # fmt: skip
        partial = (pair + program).to(tl.int64) * GROUP + members
        tl.store(acc_ptr + partial[:, None] * HEAD_DIM + dims[None, :], acc, mask=inside)
        tl.store(top_ptr + partial, top, mask=members < GROUP)
        tl.store(total_ptr + partial, total, mask=members < GROUP)
        left -= count
        tile = 0
        pair += 1


@triton.jit(do_not_specialize=["num_sequences", "programs"], do_not_specialize_on_alignment=VARYING)
def _combine_kernel(
    out_ptr, out_row,
    contexts_ptr, num_sequences, programs,
    acc_ptr, top_ptr, total_ptr, v_scale,
    SEQUENCES: tl.constexpr, KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr, TOKENS: tl.constexpr, WINDOW: tl.constexpr, PARTIALS: tl.constexpr,
):  # fmt: skip
    """One program merges one query head of one sequence."""
    sequence, query_head = tl.program_id(0), tl.program_id(1)
    head = query_head // GROUP
    tiles, ends, length = _row_of_tiles(contexts_ptr, num_sequences, SEQUENCES, KV_HEADS, TOKENS, WINDOW)
    share = tl.maximum(tl.cdiv(length, programs), 1)
    mine = tl.arange(0, SEQUENCES) == sequence
    own_tiles = tl.sum(tl.where(mine, tiles, 0), 0)
    begin = tl.sum(tl.where(mine, ends, 0), 0) - own_tiles * (KV_HEADS - head)
    first = begin // share
    last = (begin + own_tiles - 1) // share
    stop = tl.where(own_tiles > 0, last + 1, first)

    dims = tl.arange(0, DIM)
    top = tl.full([], float("-inf"), tl.float32)
    total = tl.zeros([], tl.float32)
    acc = tl.zeros([DIM], tl.float32)
    for start in tl.range(first, stop, PARTIALS):
        worker = start + tl.arange(0, PARTIALS)
        met = worker <= last
        partial = (sequence * KV_HEADS + head + worker).to(tl.int64) * GROUP + query_head % GROUP
        tops = tl.load(top_ptr + partial, mask=met, other=float("-inf"))
        new_top = tl.maximum(top, tl.max(tops, 0))
        fade = tl.exp2(top - new_top)
        weights = tl.exp2(tops - new_top)
        values = tl.load(
            acc_ptr + partial[:, None] * HEAD_DIM + dims[None, :],
            mask=met[:, None] & (dims < HEAD_DIM)[None, :],
            other=0.0,
        )
        total = total * fade + tl.sum(weights * tl.load(total_ptr + partial, mask=met, other=0.0), 0)
        acc = acc * fade + tl.sum(weights[:, None] * values, 0)
        top = new_top
    result = acc * v_scale / tl.where(total > 0.0, total, 1.0)  # a sequence without tokens gives zeros
    out = out_ptr + sequence.to(tl.int64) * out_row + query_head * HEAD_DIM + dims
    tl.store(out, result.to(out_ptr.dtype.element_ty), mask=dims < HEAD_DIM)


def decode(
    q: Tensor,
    kv: Tensor,
    layer: int,
    block_tables: Tensor,
    context_lens: Tensor,
    scale: float,
    out: Tensor,
    cut: Cut,
    programs: int,
    window: int | None = None,
    soft_cap: float | None = None,
    kv_scales: KvScales = UNSCALED,
) -> None:
    """The first S rows of ``q [T, Hq, D]`` are those of the S tables and contexts; so many of ``out [T, Hq * D]``
    are filled.

    ``kv [blocks, Hkv, L, 2, B, D]``; ``programs`` run side by side on the device."""
    sequences, heads, head_dim = context_lens.shape[0], q.shape[1], q.shape[2]
    kv_heads, block_tokens = kv.shape[1], kv.shape[4]
    group = heads // kv_heads
    dim = max(16, triton.next_power_of_2(head_dim))
    padded = padded_sequences(sequences)
    partials = sequences * kv_heads + programs
    acc = torch.empty((partials, group, head_dim), dtype=torch.float32, device=q.device)
    top = torch.empty((partials, group), dtype=torch.float32, device=q.device)
    total = torch.empty_like(top)  # apart from ``top``: aligned alike in every call
    strides = kv.stride()
    scale *= kv_scales.k
    _decode_kernel[(programs,)](
        q, q.stride(0), q.stride(1),
        kv[:, :, layer], strides[0], strides[1], strides[3], strides[4],
        block_tables, block_tables.stride(0), context_lens, sequences,
        acc, top, total, scale if soft_cap is not None else scale * 1.4426950408889634,
        SEQUENCES=padded, KV_HEADS=kv_heads, GROUP=group, ROWS=cut.rows,
        BLOCK_TOKENS=block_tokens, HEAD_DIM=head_dim, DIM=dim, TOKENS=cut.tokens,
        WINDOW=window, SOFT_CAP=soft_cap,
        WIDE=triton.knobs.runtime.interpret, STAGES=cut.stages,
        num_warps=cut.warps,
    )  # fmt: skip
    _combine_kernel[(sequences, heads)](
        out, out.stride(0), context_lens, sequences, programs, acc, top, total, kv_scales.v,
        SEQUENCES=padded, KV_HEADS=kv_heads, GROUP=group, HEAD_DIM=head_dim, DIM=dim,
        TOKENS=cut.tokens, WINDOW=window, PARTIALS=16, num_warps=2,
    )  # fmt: skip
