"""The native CPU backend: the interface of :mod:`kernels.interface` on the shared library's functions.

Owns the library and the thread pool. Shapes and dtypes that the library does not cover go to the reference, so
every model runs. Meant for one caller at a time; a second one is served correctly, but on its own thread alone.
"""

from __future__ import annotations

import weakref
from ctypes import addressof, c_int32
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernels.cpu import linear
from kernels.cpu.build import library, runnable_isas
from kernels.cpu.decoder import NativeDecoder, covers
from kernels.cpu.library import Batch, Functions, KvPool, Library
from kernels.decoder import DecoderWeights, LayerByLayer
from kernels.interface import (
    UNSCALED,
    AttentionBatch,
    AttentionShape,
    Decoder,
    KvScales,
    Linear,
    SampleParams,
    SpareCores,
)  # fmt: skip
from kernels.memory import Arena
from kernels.reference import GateUp, ReferenceKernels

MAX_HEAD_DIM = 256


class _BoundBatch(NamedTuple):
    batch: AttentionBatch  # kept: the structure points into its tensors
    native: Batch
    address: int


class _BoundPool(NamedTuple):
    kv: Tensor
    native: KvPool
    address: int
    covered: bool  # by the native attention


class CpuKernels:
    """Kernels for float32 and bfloat16 models on ``threads`` threads (torch's number when made, by default), and
    on ``spare`` cores while these are free.

    ``isa`` is one of ``kernels.cpu.build.ISAS``; by default the best that this machine runs. Raises BuildError
    without a compiler, ValueError for an unknown ``isa``.
    """

    name = "cpu"
    capturable = False

    def __init__(
        self, isa: str | None = None, threads: int | None = None, spare: SpareCores | None = None
    ) -> None:
        self.isa = isa or runnable_isas()[0]
        self.threads = threads or torch.get_num_threads()
        self._library = Library(library(self.isa))
        self._spare = spare  # kept: the pool's threads look into the table
        self._pool: int | None = self._create_pool(spare)
        self._close = weakref.finalize(self, self._library.pool_destroy, self._pool)
        self._functions = {torch.float32: self._library.float32, torch.bfloat16: self._library.bfloat16}
        self._memory = Arena()  # for weights
        self._reference = ReferenceKernels()
        # A step calls every layer with the same batch and pool: what C needs of them is laid out once.
        self._batch: _BoundBatch | None = None
        self._kv: _BoundPool | None = None

    def _create_pool(self, spare: SpareCores | None) -> Any:
        if spare is None:
            return self._library.pool_create(self.threads, None, None, 0, 0)
        table = spare.table
        assert table.dtype is torch.int32 and table.is_contiguous() and table.shape[1] == 16
        assert all(0 <= core < len(table) for core in spare.cores) and spare.borrower != 0
        count = len(spare.cores)
        cores = (c_int32 * count)(*spare.cores)
        return self._library.pool_create(self.threads, table.data_ptr(), cores, count, spare.borrower)

    def close(self) -> None:
        """Ends the threads; the kernels and their linear layers must not be called again."""
        self._close()

    def check(self, shape: AttentionShape) -> None:
        self._reference.check(shape)  # serves what the native code does not

    def pack_linear(self, weight: Tensor, bias: Tensor | None, out_dtype: torch.dtype | None = None) -> Linear:
        functions = self._packing(weight, 2)
        if functions is None or out_dtype not in (None, weight.dtype, torch.float32):
            return self._reference.pack_linear(weight, bias, out_dtype)
        return linear.pack(functions, self._pool, self._memory, weight, bias, out_dtype)

    def pack_linear_int8(
        self, weight: Tensor, bias: Tensor | None, out_dtype: torch.dtype | None = None
    ) -> Linear:
        functions = self._packing(weight, 4)
        if functions is None or out_dtype not in (None, weight.dtype, torch.float32):
            return self._reference.pack_linear_int8(weight, bias, out_dtype)
        return linear.pack_int8(self._library, functions, self._pool, self._memory, weight, bias, out_dtype)

    def pack_gate_up(self, weight: Tensor, bias: Tensor | None, *, int8: bool = False) -> Linear:
        functions = self._packing(weight, 4 if int8 else 2)
        if functions is None or weight.shape[0] % (2 * linear.PANEL):
            pack = self.pack_linear_int8 if int8 else self.pack_linear
            return GateUp(pack(weight, bias), self.silu_mul)
        if int8:
            return linear.pack_int8(self._library, functions, self._pool, self._memory, weight, bias, gated=True)
        return linear.pack(functions, self._pool, self._memory, weight, bias, gated=True)

    def decoder(self, weights: DecoderWeights) -> Decoder:
        apart = LayerByLayer(self, weights)
        dtype = weights.last_norm.dtype
        functions = self._functions.get(dtype)
        if functions is None or not covers(weights, dtype):
            return apart
        native = NativeDecoder(functions.decoder, self._pool, weights)

        def run(residual: Tensor, kv: Tensor, batch: AttentionBatch) -> Tensor:
            pool = self._bind_pool(kv)
            full = weights.window is None or weights.window >= batch.max_context
            if not (full and pool.covered and kv.dtype is dtype and residual.is_contiguous()):
                return apart(residual, kv, batch)
            return native(residual, pool.address, self._bind_batch(batch).address)

        return run

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        functions = self._covering(x, weight)
        width = x.shape[-1]
        if x.is_contiguous():
            outer, inner, inner_stride = width, 1, 0
        elif x.dim() == 2 and x.stride(1) == 1:
            outer, inner, inner_stride = x.stride(0), 1, 0
        elif x.dim() == 3 and x.stride(2) == 1:
            outer, inner, inner_stride = x.stride(0), x.shape[1], x.stride(1)
        else:
            functions = None
        if functions is None:
            return self._reference.rms_norm(x, weight, eps)
        out = x.new_empty(x.shape)
        functions.rms_norm(
            self._pool, x.data_ptr(), outer, inner, inner_stride, weight.data_ptr(), eps,
            x.numel() // width, width, out.data_ptr(),
        )  # fmt: skip
        return out

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
        functions = self._covering(x, weight)
        if functions is None or not (x.is_contiguous() and residual.is_contiguous()):
            return self._reference.add_rms_norm(x, residual, weight, eps)
        rows, width = x.shape
        out = x.new_empty((rows, width))
        functions.add_rms_norm(
            self._pool, x.data_ptr(), residual.data_ptr(), weight.data_ptr(), eps, rows, width, out.data_ptr()
        )
        return out

    def rope_kv_write(
        self, q: Tensor, k: Tensor, v: Tensor, cos_sin: Tensor, kv: Tensor, layer: int, batch: AttentionBatch,
        kv_scales: KvScales = UNSCALED,
    ) -> None:  # fmt: skip
        pool = self._bind_pool(kv)
        head_dim = q.shape[2]
        functions = self._covering(q, kv)
        if functions is None or not (pool.covered and _packed_heads(q, k, v) and cos_sin.is_contiguous()):
            return self._reference.rope_kv_write(q, k, v, cos_sin, kv, layer, batch, kv_scales)
        assert cos_sin.dtype is torch.float32 and cos_sin.shape[1] == head_dim
        functions.rope_kv_write(
            self._pool, q.data_ptr(), q.stride(0), q.shape[1], k.data_ptr(), k.stride(0), v.data_ptr(),
            v.stride(0), cos_sin.data_ptr(), pool.address, layer, self._bind_batch(batch).address,
        )  # fmt: skip
        return None

    def paged_attention(
        self, q: Tensor, kv: Tensor, layer: int, batch: AttentionBatch, scale: float, *,
        window: int | None = None, soft_cap: float | None = None, kv_scales: KvScales = UNSCALED,
    ) -> Tensor:  # fmt: skip
        pool = self._bind_pool(kv)
        functions = self._covering(q, kv)
        full = soft_cap is None and (window is None or window >= batch.max_context)
        if functions is None or not (full and pool.covered and _packed_heads(q)):
            return self._reference.paged_attention(
                q, kv, layer, batch, scale, window=window, soft_cap=soft_cap, kv_scales=kv_scales
            )
        rows, heads, head_dim = q.shape
        native = self._bind_batch(batch)
        out = q.new_empty((rows, heads * head_dim))
        arguments = (
            self._pool, native.address, pool.address, layer, q.data_ptr(), q.stride(0), heads, scale,
            out.data_ptr(),
        )  # fmt: skip
        if batch.num_decodes > 0:
            functions.decode(*arguments)
        if batch.num_decodes < native.native.sequences:
            functions.chunks(*arguments)
        return out

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        functions = self._functions.get(gate_up.dtype)
        row, step = gate_up.stride()
        if functions is None or step != 1:
            return self._reference.silu_mul(gate_up)
        rows, width = gate_up.shape[0], gate_up.shape[1] // 2
        out = gate_up.new_empty((rows, width))
        functions.silu_mul(self._pool, gate_up.data_ptr(), row, rows, width, out.data_ptr())
        return out

    def argmax(self, logits: Tensor) -> Tensor:
        if logits.dtype is not torch.float32 or not logits.is_contiguous():
            return self._reference.argmax(logits)
        rows, width = logits.shape
        out = torch.empty(rows, dtype=torch.int64)
        self._library.argmax(self._pool, logits.data_ptr(), rows, width, out.data_ptr())
        return out

    def sample(self, logits: Tensor, params: SampleParams) -> Tensor:
        return self._reference.sample(logits, params)

    def read_memory(self, data: Tensor) -> None:
        """Reads a contiguous tensor on all threads and drops it: the limit that benchmarks compare with."""
        self._library.read_memory(self._pool, data.data_ptr(), data.numel() * data.element_size() // 8)

    def _packing(self, weight: Tensor, multiple: int) -> Functions | None:
        """What packs this weight, whose rows must be so even; None where the library does not cover it."""
        covered = weight.device.type == "cpu" and weight.shape[1] % multiple == 0
        return self._functions.get(weight.dtype) if covered else None

    def _covering(self, x: Tensor, other: Tensor) -> Functions | None:
        return self._functions.get(x.dtype) if x.dtype is other.dtype else None

    def _bind_pool(self, kv: Tensor) -> _BoundPool:
        bound = self._kv
        if bound is None or bound.kv is not kv:
            _, kv_heads, _, _, block_tokens, head_dim = kv.shape
            native = KvPool(kv.data_ptr(), *kv.stride()[:3], kv_heads, block_tokens, head_dim)
            covered = (
                block_tokens % 16 == 0
                and head_dim % 16 == 0
                and head_dim <= MAX_HEAD_DIM
                and kv.stride()[3:] == (block_tokens * head_dim, head_dim, 1)
            )
            bound = self._kv = _BoundPool(kv, native, addressof(native), covered)
        return bound

    def _bind_batch(self, batch: AttentionBatch) -> _BoundBatch:
        bound = self._batch
        if bound is None or bound.batch is not batch:
            for wide in (batch.positions, batch.slots):
                assert wide.dtype is torch.int64 and wide.is_contiguous()
            for narrow in (batch.query_start, batch.context_lens):
                assert narrow.dtype is torch.int32 and narrow.is_contiguous()
            assert batch.block_tables.dtype is torch.int32 and batch.block_tables.stride(1) == 1
            native = Batch(
                batch.positions.data_ptr(),
                batch.slots.data_ptr(),
                batch.query_start.data_ptr(),
                batch.context_lens.data_ptr(),
                batch.block_tables.data_ptr(),
                batch.block_tables.stride(0),
                batch.positions.shape[0],
                batch.context_lens.shape[0],
                batch.num_decodes,
            )
            bound = self._batch = _BoundBatch(batch, native, addressof(native))
        return bound


def _packed_heads(*rows: Tensor) -> bool:
    """Whether each ``[T, H, D]`` has its heads side by side (any stride between rows)."""
    return all(x.stride(2) == 1 and x.stride(1) == x.shape[2] for x in rows)
