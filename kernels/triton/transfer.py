"""Blocks on their way out of the pool and into it: gather, scatter, and a checksum, without leaving the device.

Knows blocks as ranges of 32-bit words. The checksum is a sum of mixed words, each with its place, so programs
may add up their parts in any order; `checksum_words` of a host says the same of the same bytes. Changing one word
always changes it, since the mix of a word is a bijection (the finaliser of MurmurHash3,
https://github.com/aappleby/smhasher). Invariant: nothing outside the named ranges is read or written.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

WORDS = 2048  # of a block, by one step of one program
PARTS = 16  # programs for one block's checksum, at most


@triton.jit
def _move_kernel(
    pool_ptr, staged_ptr, blocks_ptr, block_words, first_word, words,
    WORDS: tl.constexpr, INTO_POOL: tl.constexpr,
):  # fmt: skip
    place = tl.program_id(0).to(tl.int64)
    word = tl.program_id(1) * WORDS + tl.arange(0, WORDS)
    inside = word < words
    there = pool_ptr + tl.load(blocks_ptr + place) * block_words + first_word + word
    here = staged_ptr + place * words + word
    if INTO_POOL:
        tl.store(there, tl.load(here, mask=inside), mask=inside)
    else:
        tl.store(here, tl.load(there, mask=inside), mask=inside)


@triton.jit
def _checksum_kernel(
    pool_ptr, blocks_ptr, block_words, first_word, words, out_ptr, WORDS: tl.constexpr
):  # fmt: skip
    block = tl.load(blocks_ptr + tl.program_id(0))
    total = tl.zeros([WORDS], tl.uint32)
    for start in tl.range(tl.program_id(1) * WORDS, words, tl.num_programs(1) * WORDS):
        word = start + tl.arange(0, WORDS)
        inside = word < words
        x = tl.load(pool_ptr + block * block_words + first_word + word, mask=inside, other=0)
        x = x.to(tl.uint32, bitcast=True) + (word + 1).to(tl.uint32) * tl.full([], 0x9E3779B1, tl.uint32)
        x = (x ^ (x >> 16)) * tl.full([], 0x85EBCA6B, tl.uint32)
        x = (x ^ (x >> 13)) * tl.full([], 0xC2B2AE35, tl.uint32)
        total += tl.where(inside, x ^ (x >> 16), 0).to(tl.uint32)
    tl.atomic_add(out_ptr + tl.program_id(0), tl.sum(total.to(tl.int32, bitcast=True), 0))


def gather(pool: Tensor, blocks: Tensor, first_word: int, staged: Tensor) -> None:
    """``pool [num_blocks, block_words]`` int32; the words from ``first_word`` on of ``blocks [n]`` int64 go to
    ``staged [n, words]``."""
    _move(pool, blocks, first_word, staged, into_pool=False)


def scatter(pool: Tensor, blocks: Tensor, first_word: int, staged: Tensor) -> None:
    """The way back; ``blocks`` are different ones."""
    _move(pool, blocks, first_word, staged, into_pool=True)


def checksums(pool: Tensor, blocks: Tensor, first_word: int, words: int) -> Tensor:
    """Of so many words of each of ``blocks [n]``, ``[n]`` int32."""
    assert pool.dtype is torch.int32 and pool.is_contiguous() and blocks.dtype is torch.int64
    out = torch.zeros(blocks.shape, dtype=torch.int32, device=pool.device)
    if blocks.numel() and words:
        parts = min(PARTS, triton.cdiv(words, WORDS))
        _checksum_kernel[(blocks.numel(), parts)](
            pool, blocks, pool.shape[1], first_word, words, out, WORDS=WORDS, num_warps=4
        )
    return out


def _move(pool: Tensor, blocks: Tensor, first_word: int, staged: Tensor, *, into_pool: bool) -> None:
    assert pool.dtype is staged.dtype is torch.int32 and pool.is_contiguous() and staged.is_contiguous()
    assert blocks.dtype is torch.int64 and staged.shape[0] == blocks.numel()
    if staged.numel():
        _move_kernel[(blocks.numel(), triton.cdiv(staged.shape[1], WORDS))](
            pool, staged, blocks, pool.shape[1], first_word, staged.shape[1], WORDS=WORDS, INTO_POOL=into_pool,
            num_warps=4,
        )  # fmt: skip
