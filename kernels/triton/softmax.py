"""The inner loop of both attention kernels: one tile of queries over a range of one sequence's tokens.

Knows one KV head's tiles through a block table, and not how the work was divided. Invariant: reads no slot
beyond the last position of the tile, whatever it holds. Online softmax: https://arxiv.org/abs/1805.02867.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def attend(
    top, total, acc,  # [ROWS], [ROWS], [ROWS, DIM] float32: largest score, sum of weights, weighted values
    q,  # [ROWS, DIM]
    positions,  # [ROWS]: a row sees tokens up to its position
    kv_ptr, kv_block, kv_value, kv_token,  # the head's first tile; strides in elements
    table_ptr,  # the sequence's block ids
    begin, end,  # tokens, begin a multiple of TOKENS
    seen,  # tokens from here on are not read
    scale,  # of the scores, log2(e) included unless SOFT_CAP
    BLOCK_TOKENS: tl.constexpr, HEAD_DIM: tl.constexpr, DIM: tl.constexpr, TOKENS: tl.constexpr,
    WINDOW: tl.constexpr,  # a row sees so many tokens, its own included; None: all
    SOFT_CAP: tl.constexpr,  # scores are cap * tanh(score / cap); None: as they are
    MASKED: tl.constexpr,  # False: all rows see all tokens of the range
    WIDE: tl.constexpr,  # multiply in float32: the interpreter has no products of bfloat16
    STAGES: tl.constexpr,  # steps under way at once; 1: none is loaded ahead
):  # fmt: skip
    dims = tl.arange(0, DIM)
    if WIDE:
        q = q.to(tl.float32)
    # a step's K and V wait for their block ids, so each of them takes two of Triton's stages
    for start in tl.range(begin, end, TOKENS, num_stages=2 * STAGES - 1):
        tokens = start + tl.arange(0, TOKENS)
        if MASKED:
            blocks = tl.load(table_ptr + tokens // BLOCK_TOKENS, mask=tokens < seen, other=0)
        else:
            blocks = tl.load(table_ptr + tokens // BLOCK_TOKENS)
        offsets = blocks.to(tl.int64) * kv_block + (tokens % BLOCK_TOKENS) * kv_token
        k_ptrs = kv_ptr + offsets[None, :] + dims[:, None]
        v_ptrs = kv_ptr + kv_value + offsets[:, None] + dims[None, :]
        if MASKED or DIM != HEAD_DIM:
            k = tl.load(k_ptrs, mask=(tokens < seen)[None, :] & (dims < HEAD_DIM)[:, None], other=0.0)
            v = tl.load(v_ptrs, mask=(tokens < seen)[:, None] & (dims < HEAD_DIM)[None, :], other=0.0)
        else:
            k = tl.load(k_ptrs)
            v = tl.load(v_ptrs)
        scores = tl.dot(q, k.to(q.dtype), input_precision="ieee") * scale
        if SOFT_CAP is not None:
            # tanh as 1 - 2 / (1 + exp(2x)), in a range where exp does not overflow
            bent = tl.exp2(tl.minimum(tl.maximum(scores * (2.885390081777927 / SOFT_CAP), -60.0), 60.0))
            scores = (SOFT_CAP * 1.4426950408889634) * (1.0 - 2.0 / (1.0 + bent))
        if MASKED:
            visible = tokens[None, :] <= positions[:, None]
            if WINDOW is not None:
                visible = visible & (tokens[None, :] > positions[:, None] - WINDOW)
            # finite, so that a row without visible tokens stays a number; its first visible one wipes it out
            scores = tl.where(visible, scores, -1.0e30)
        new_top = tl.maximum(top, tl.max(scores, 1))
        fade = tl.exp2(top - new_top)
        weights = tl.exp2(scores - new_top[:, None])
        total = total * fade + tl.sum(weights, 1)
        acc = acc * fade[:, None]
        acc = tl.dot(weights.to(q.dtype), v.to(q.dtype), acc, input_precision="ieee")
        top = new_top
    return top, total, acc
