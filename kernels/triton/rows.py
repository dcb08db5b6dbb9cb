"""Functions of single rows: RMS norm, with the residual or without, the gated activation, and rounding to float8.

Knows rows and their strides. Invariant: a row's result depends on that row alone, not on its company.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

ELEMENTS = 4096  # that one program takes at least


@triton.jit(do_not_specialize=["rows"])
def _rms_norm_kernel(
    x_ptr, x_outer, x_inner, weight_ptr, out_ptr, rows, eps,
    INNER: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    inside = (row < rows)[:, None] & (column < WIDTH)[None, :]
    place = (row // INNER).to(tl.int64) * x_outer + (row % INNER) * x_inner
    x = tl.load(x_ptr + place[:, None] + column[None, :], mask=inside, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + column, mask=column < WIDTH, other=0.0).to(tl.float32)
    x = x * tl.rsqrt(tl.sum(x * x, 1) / WIDTH + eps)[:, None] * weight[None, :]
    out = out_ptr + row.to(tl.int64)[:, None] * WIDTH + column[None, :]
    tl.store(out, x.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _add_rms_norm_kernel(
    x_ptr, residual_ptr, weight_ptr, out_ptr, eps, WIDTH: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    column = tl.arange(0, COLUMNS)
    inside = column < WIDTH
    place = tl.program_id(0).to(tl.int64) * WIDTH + column
    x = tl.load(x_ptr + place, mask=inside, other=0.0).to(tl.float32)
    total = (x + tl.load(residual_ptr + place, mask=inside, other=0.0)).to(residual_ptr.dtype.element_ty)
    tl.store(residual_ptr + place, total, mask=inside)
    x = total.to(tl.float32)
    weight = tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32)
    x = x * tl.rsqrt(tl.sum(x * x, 0) / WIDTH + eps) * weight
    tl.store(out_ptr + place, x.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _silu_mul_kernel(x_ptr, x_row, out_ptr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < WIDTH
    gate = tl.load(x_ptr + row * x_row + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(x_ptr + row * x_row + WIDTH + column, mask=inside, other=0.0).to(tl.float32)
    small = tl.exp(-tl.abs(gate))  # in (0, 1]: never overflows
    sigmoid = tl.where(gate >= 0, 1.0, small) / (1.0 + small)
    tl.store(out_ptr + row * WIDTH + column, (gate * sigmoid * up).to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _quantize_kernel(x_ptr, x_row, out_ptr, scales_ptr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, COLUMNS)
    inside = column < WIDTH
    x = tl.load(x_ptr + row * x_row + column, mask=inside, other=0.0).to(tl.float32)
    top = tl.max(tl.abs(x), 0)
    scale = tl.maximum(tl.div_rn(top, tl.full([], 448.0, tl.float32)), 1e-12)
    broken = tl.sum((x != x).to(tl.int32), 0) > 0  # max passes over what is not a number
    tl.store(scales_ptr + row, tl.where(broken, float("nan"), scale))
    x = tl.minimum(tl.maximum(tl.div_rn(x, scale + tl.zeros_like(x)), -448.0), 448.0)
    tl.store(out_ptr + row * WIDTH + column, x.to(out_ptr.dtype.element_ty), mask=inside)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``x [..., D]``, the last dimension dense; at most two others, or all contiguous. ``[..., D]`` contiguous."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    width = x.shape[-1]
    rows = x.numel() // width
    if rows == 0:
        return out
    if x.is_contiguous():
        outer, inner, inner_stride = width, 1, 0
    elif x.dim() == 3:
        outer, inner, inner_stride = x.stride(0), x.shape[1], x.stride(1)
    else:
        assert x.dim() == 2
        outer, inner, inner_stride = x.stride(0), 1, 0
    assert x.stride(-1) == 1 and weight.is_contiguous()
    columns = triton.next_power_of_2(width)
    block = max(1, ELEMENTS // columns)
    _rms_norm_kernel[(triton.cdiv(rows, block),)](
        x, outer, inner_stride, weight, out, rows, eps, INNER=inner, WIDTH=width, ROWS=block, COLUMNS=columns,
        num_warps=_warps(block * columns),
    )  # fmt: skip
    return out


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``residual [T, D] += x``; the norm of the sum."""
    out = torch.empty_like(x)
    rows, width = x.shape
    assert x.is_contiguous() and residual.is_contiguous() and weight.is_contiguous()
    if rows:
        columns = triton.next_power_of_2(width)
        _add_rms_norm_kernel[(rows,)](
            x, residual, weight, out, eps, WIDTH=width, COLUMNS=columns, num_warps=_warps(columns)
        )
    return out


def silu_mul(gate_up: Tensor) -> Tensor:
    """``gate_up [T, 2 * I]``, rows dense -> ``[T, I]``."""
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    assert gate_up.stride(1) == 1
    out = torch.empty((rows, width), dtype=gate_up.dtype, device=gate_up.device)
    if rows:
        columns = min(2048, triton.next_power_of_2(width))
        _silu_mul_kernel[(rows, triton.cdiv(width, columns))](
            gate_up, gate_up.stride(0), out, WIDTH=width, COLUMNS=columns, num_warps=_warps(columns)
        )
    return out


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """As `kernels.fp8.quantize_channels`: ``x [T, K]``, dense rows -> e4m3 ``[T, K]``, float32 scales ``[T]``."""
    rows, width = x.shape
    assert x.stride(1) == 1
    out = torch.empty((rows, width), dtype=torch.float8_e4m3fn, device=x.device)
    scales = torch.empty(rows, dtype=torch.float32, device=x.device)
    if rows:
        columns = triton.next_power_of_2(width)
        _quantize_kernel[(rows,)](
            x, x.stride(0), out, scales, WIDTH=width, COLUMNS=columns, num_warps=_warps(columns)
        )
    return out, scales


def _warps(elements: int) -> int:
    """Eight or more elements a thread: loads of 16 bytes in the short types."""
    return min(16, max(1, elements // 256))
