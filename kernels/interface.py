"""What the engine calls on tensors: one small set of functions that every backend provides.

A backend knows tensors, block tables and nothing else: no requests, no scheduler. Every backend passes
``tests/kernels/test_contract.py`` against :mod:`kernels.reference`. Rows of a step are its tokens, grouped by
sequence; sequences with a single row (decodes) come first, so a backend may treat the two groups apart.

Notation: T rows, S sequences, Hq query heads, Hkv KV heads, D head size, L layers, B tokens a block.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from kernels.decoder import DecoderWeights


@dataclass(frozen=True, slots=True)
class AttentionBatch:
    """Where the rows of one step stand in their sequences and in the pool.

    A row's K and V are written at its slot before attention; row ``r`` of sequence ``s`` then attends to the
    pool's tokens ``0 … positions[r]`` of that sequence (causal).
    """

    positions: Tensor  # [T] int64, place of each row in its sequence, from 0
    slots: Tensor  # [T] int64, block id * B + offset in the block
    query_start: Tensor  # [S + 1] int32, first row of each sequence; the last entry is T
    context_lens: Tensor  # [S] int32, tokens of each sequence in the pool after this step's write
    block_tables: Tensor  # [S, max_blocks] int32, block ids in order; entries past the context are any valid id
    num_decodes: int  # the first so many sequences have exactly one row
    max_query: int  # most rows of one sequence
    max_context: int  # largest of context_lens


@dataclass(frozen=True, slots=True)
class SpareCores:
    """Cores of other processes of this machine, which may be computed on while their owners have nothing to do."""

    cores: tuple[int, ...]
    table: Tensor  # [cores of the machine, 16] int32, shared: 0 owner at work, 1 borrower or 0, 2 calls joined
    borrower: int  # this process in column 1; not 0


@dataclass(frozen=True, slots=True)
class SampleParams:
    """How each row of a batch draws its token. On the device of the logits."""

    temperature: Tensor  # [S] float32; 0: the largest logit, and the rest is not looked at
    top_k: Tensor  # [S] int32; 0: all
    top_p: Tensor  # [S] float32; 1: all
    min_p: Tensor  # [S] float32; 0: all
    uniform: Tensor  # [S] float64 in [0, 1), the row's random number


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """What an attention layer asks of a backend."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    block_tokens: int
    dtype: torch.dtype  # of queries and results
    kv_dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class KvScales:
    """Of a pool in float8 (e4m3fn): K and V are what is stored, times these. Pools of other types have none."""

    k: float = 1.0
    v: float = 1.0


UNSCALED = KvScales()


class Linear(Protocol):
    """A linear layer whose weight was packed for the backend once."""

    def __call__(self, x: Tensor) -> Tensor:
        """``x [T, K]`` -> ``[T, N]``: ``x @ weight.T + bias``, accumulated in float32, rounded once to the dtype
        that it was packed for."""
        ...


class Decoder(Protocol):
    """The layers of a model, made for a backend once."""

    def __call__(self, residual: Tensor, kv: Tensor, batch: AttentionBatch) -> Tensor:
        """Hidden states after the last norm, ``[T, hidden]``, of embedded rows ``residual [T, hidden]``, which are
        overwritten; fills the pool's slots."""
        ...


class Kernels(Protocol):
    """One backend. Tensors share a device and, unless said otherwise, the model's dtype."""

    name: str
    capturable: bool  # no launch depends on what a tensor holds: a step may be captured as a CUDA graph

    def check(self, shape: AttentionShape) -> None:
        """ValueError, in one line, if this backend can't serve such layers on its device."""
        ...

    def pack_linear(self, weight: Tensor, bias: Tensor | None, out_dtype: torch.dtype | None = None) -> Linear:
        """``weight [N, K]``, ``bias [N]``; results in ``out_dtype``, by default the weight's dtype. The backend
        may keep its own copy; the caller drops its own."""
        ...

    def pack_linear_int8(
        self, weight: Tensor, bias: Tensor | None, out_dtype: torch.dtype | None = None
    ) -> Linear:
        """As pack_linear, with the weight rounded to int8, symmetric, one scale per output. Activations keep
        ``weight``'s dtype or more."""
        ...

    def pack_gate_up(self, weight: Tensor, bias: Tensor | None, *, int8: bool = False) -> Linear:
        """``weight [2 * I, K]``, gates first, ``bias [2 * I]``. The layer gives ``silu(gate) * up``, ``[T, I]``,
        as silu_mul after pack_linear (``int8``: pack_linear_int8) would, with one rounding less or more."""
        ...

    def decoder(self, weights: DecoderWeights) -> Decoder:
        """The layers of a model whose linear layers this backend packed."""
        ...

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """``x [..., D] / sqrt(mean(x²) + eps) * weight [D]``; the statistics in float32. ``x`` may be strided
        in all but its last dimension. https://arxiv.org/abs/1910.07467"""
        ...

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
        """``residual += x`` in place, then the norm of the sum. ``x, residual [T, D]``, contiguous."""
        ...

    def rope_kv_write(
        self, q: Tensor, k: Tensor, v: Tensor, cos_sin: Tensor, kv: Tensor, layer: int, batch: AttentionBatch,
        kv_scales: KvScales = UNSCALED,
    ) -> None:  # fmt: skip
        """Rotates ``q`` and ``k`` in place (halves, as GPT-NeoX) and writes ``k`` and ``v`` to the rows' slots.

        ``q [T, Hq, D]``, ``k, v [T, Hkv, D]``: views of one qkv row, strided in the first dimension.
        ``cos_sin [positions, D]`` float32, cosines in the first half. ``kv [blocks, Hkv, L, 2, B, D]``; what is
        too large for a float8 pool becomes its largest value.
        https://arxiv.org/abs/2104.09864"""
        ...

    def paged_attention(
        self, q: Tensor, kv: Tensor, layer: int, batch: AttentionBatch, scale: float, *,
        window: int | None = None, soft_cap: float | None = None, kv_scales: KvScales = UNSCALED,
    ) -> Tensor:  # fmt: skip
        """Causal attention of ``q [T, Hq, D]`` over the sequences' blocks -> ``[T, Hq * D]`` contiguous.

        Query head ``h`` reads KV head ``h // (Hq // Hkv)``. ``kv [blocks, Hkv, L, 2, B, D]``, K at index 0, in
        q's dtype or float8. ``window``: a row sees so many tokens, its own included. ``soft_cap``: scores are
        ``soft_cap * tanh(score / soft_cap)``."""
        ...

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        """``gate_up [T, 2 * I]`` -> ``silu(gate) * up``, ``[T, I]``. https://arxiv.org/abs/2002.05202"""
        ...

    def argmax(self, logits: Tensor) -> Tensor:
        """The place of the largest of each row of ``logits [S, V]`` float32 -> ``[S]`` int64; of equal ones the
        first, and a NaN is larger than anything."""
        ...

    def sample(self, logits: Tensor, params: SampleParams) -> Tensor:
        """One token for each row of ``logits [S, V]`` float32 -> ``[S]`` int64, always below V.

        A row keeps its logits / temperature from the largest down as min-p, then top-k, then top-p say (of what
        the others left, up to the one that reaches top-p; ties are kept) and takes, in vocabulary order, the
        first token whose cumulative probability exceeds ``uniform``. Never waits for the device."""
        ...


def pool_shape(
    num_blocks: int, num_kv_heads: int, num_layers: int, block_tokens: int, head_dim: int
) -> torch.Size:
    """Shape of the KV pool tensor; one block is contiguous, and so is each (head, layer, K or V) tile."""
    return torch.Size((num_blocks, num_kv_heads, num_layers, 2, block_tokens, head_dim))
