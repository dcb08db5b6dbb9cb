"""The Triton backend: the interface of :mod:`kernels.interface` on one NVIDIA GPU.

Owns the device's tuning; a cut that does not fit the device gives way to a smaller one. Linear layers are torch's.
Invariant: no call waits for the device or reads from it, so all may be captured in a graph.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
import triton
from torch import Tensor
from triton.runtime.errors import OutOfResources

from kernels.interface import UNSCALED, AttentionBatch, AttentionShape, KvScales, SampleParams, pool_shape
from kernels.reference import ReferenceKernels
from kernels.triton import decode, prefill, rope, rows, sampling
from kernels.triton.tuning import INTERPRETER, Cut, Device, Shape, Tuning, smaller

MOST_HEAD_DIM = 256
MOST_GROUP = 64
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
OLDEST_FP8 = (8, 9)

logger = logging.getLogger(__name__)


class TritonKernels(ReferenceKernels):
    """``device``: a GPU; "cpu" only in Triton's interpreter. ``tuning``: by default the device's file."""

    name = "triton"
    capturable = True

    def __init__(self, device: str = "cuda", tuning: Tuning | None = None) -> None:
        self._device, interpreted = device, device == "cpu"
        if interpreted and not triton.knobs.runtime.interpret:
            raise ValueError("the Triton kernels need a GPU, or TRITON_INTERPRET=1 in the environment")
        self.tuning = tuning or Tuning.load(INTERPRETER if interpreted else Device.cuda(torch.device(device)))

    def check(self, shape: AttentionShape) -> None:
        super().check(shape)
        name, group = self.tuning.device.name, shape.num_heads // shape.num_kv_heads
        if shape.head_dim % 2 or shape.head_dim > MOST_HEAD_DIM:
            raise ValueError(
                f"the Triton kernels serve even head sizes up to {MOST_HEAD_DIM}, not {shape.head_dim}; "
                "--kernels reference serves any, slowly"
            )
        if group > MOST_GROUP:
            raise ValueError(f"the Triton kernels serve up to {MOST_GROUP} query heads a KV head, not {group}")
        if shape.dtype not in DTYPES or shape.kv_dtype not in (shape.dtype, torch.float8_e4m3fn):
            raise ValueError(
                f"no Triton kernel serves {_name(shape.dtype)} models with KV in {_name(shape.kv_dtype)}"
            )
        if shape.kv_dtype is torch.float8_e4m3fn and self.tuning.device.capability < OLDEST_FP8:
            raise ValueError(f"{name} has no float8: KV in fp8 needs compute capability 8.9 (Ada) or newer")
        if self._device != "cpu":
            self._try_out(shape)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return rows.rms_norm(x, weight, eps)

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
        return rows.add_rms_norm(x, residual, weight, eps)

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        return rows.silu_mul(gate_up)

    def sample(self, logits: Tensor, params: SampleParams) -> Tensor:
        return sampling.sample(logits, params)

    def rope_kv_write(
        self, q: Tensor, k: Tensor, v: Tensor, cos_sin: Tensor, kv: Tensor, layer: int, batch: AttentionBatch,
        kv_scales: KvScales = UNSCALED,
    ) -> None:  # fmt: skip
        rope.rope_kv_write(q, k, v, cos_sin, kv, layer, batch.positions, batch.slots, kv_scales)

    def paged_attention(
        self, q: Tensor, kv: Tensor, layer: int, batch: AttentionBatch, scale: float, *,
        window: int | None = None, soft_cap: float | None = None, kv_scales: KvScales = UNSCALED,
    ) -> Tensor:  # fmt: skip
        num_rows, heads, head_dim = q.shape
        shape = Shape(head_dim, heads // kv.shape[1], kv.shape[4], _name(q.dtype), _name(kv.dtype))
        out = torch.empty((num_rows, heads * head_dim), dtype=q.dtype, device=q.device)
        singles, tables, contexts = batch.num_decodes, batch.block_tables, batch.context_lens

        def decodes(cut: Cut) -> None:
            programs = cut.programs * self.tuning.device.multiprocessors
            decode.decode(
                q, kv, layer, tables[:singles], contexts[:singles], scale, out, cut, programs,
                window, soft_cap, kv_scales,
            )  # fmt: skip

        def chunks(cut: Cut) -> None:
            prefill.prefill(
                q, kv, layer, tables[singles:], batch.query_start[singles:], contexts[singles:], scale, out,
                num_rows - singles, cut, window, soft_cap, kv_scales,
            )  # fmt: skip

        if singles > 0:
            self._launch("decode", shape, self.tuning.decode(shape), decodes)
        if singles < contexts.shape[0]:
            self._launch("prefill", shape, self.tuning.prefill(shape), chunks)
        return out

    def _launch(self, kernel: str, shape: Shape, cut: Cut, launch: Callable[[Cut], None]) -> None:
        """With ``cut``, or with the next smaller one that fits the device, which is kept."""
        while True:
            try:
                return launch(cut)
            except OutOfResources as error:
                less = smaller(cut, shape)
                if less is None:
                    raise ValueError(
                        f"no Triton {kernel} attention of head size {shape.head_dim} in {shape.dtype} fits "
                        f"{self.tuning.device.name}: it needs {error.required} of {error.name}, there are "
                        f"{error.limit}; --kernels reference serves it, slowly"
                    ) from error
                logger.info("%s attention with %s does not fit the device: %s", kernel, cut, error)
            cut = less
            self.tuning.keep(kernel, shape, cut)

    def _try_out(self, shape: AttentionShape) -> None:
        """Compiles attention for such layers: what does not fit the device is known at the start. ValueError."""
        device, heads = self._device, shape.num_kv_heads
        where = torch.tensor([0, 0, 1], device=device)  # one sequence with one row, one with two
        batch = AttentionBatch(
            positions=where,
            slots=where,
            query_start=torch.tensor([0, 1, 3], dtype=torch.int32, device=device),
            context_lens=torch.tensor([1, 2], dtype=torch.int32, device=device),
            block_tables=torch.zeros(2, 1, dtype=torch.int32, device=device),
            num_decodes=1,
            max_query=2,
            max_context=2,
        )
        pool = pool_shape(1, heads, 1, shape.block_tokens, shape.head_dim)
        kv = torch.zeros(pool, dtype=shape.kv_dtype, device=device)
        q = torch.zeros((3, shape.num_heads, shape.head_dim), dtype=shape.dtype, device=device)
        self.paged_attention(q, kv, 0, batch, 1.0)


def shape_of(shape: AttentionShape) -> Shape:
    """What a cut is chosen by, for such layers."""
    group = shape.num_heads // shape.num_kv_heads
    return Shape(shape.head_dim, group, shape.block_tokens, _name(shape.dtype), _name(shape.kv_dtype))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
