"""fp8 linear layers: e4m3 weights with a scale for each output, activations rounded row by row as they come.

On a GPU the product runs in the matrix units (``torch._scaled_mm``); elsewhere the same rounded numbers are
multiplied in float32, which is the reference. Invariant: both see the same rounded operands.
Format: https://arxiv.org/abs/2209.05433.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.interface import Linear

LARGEST = 448.0  # of e4m3fn
_MULTIPLE = 16  # of rows and columns of a weight, for the matrix units


def quantize_channels(x: Tensor) -> tuple[Tensor, Tensor]:
    """``x [N, K]`` -> float8 of the same shape and float32 scales ``[N]``: ``x ≈ rounded * scale``."""
    wide = x.float()
    scales = (wide.abs().amax(dim=-1) / LARGEST).clamp(min=1e-12)
    rounded = (wide / scales.unsqueeze(-1)).clamp(-LARGEST, LARGEST)
    return rounded.to(torch.float8_e4m3fn), scales


class Fp8Linear:
    """``weight [N, K]`` float8, ``scales [N]`` float32."""

    def __init__(self, weight: Tensor, scales: Tensor, bias: Tensor | None, out_dtype: torch.dtype) -> None:
        self._weight, self._scales, self._bias, self._out_dtype = weight, scales, bias, out_dtype

    def __call__(self, x: Tensor) -> Tensor:
        rounded, row_scales = quantize_channels(x)
        y = F.linear(rounded.float(), self._weight.float()) * row_scales.unsqueeze(1) * self._scales
        return (y if self._bias is None else y + self._bias.float()).to(self._out_dtype)


class Fp8LinearCuda(Fp8Linear):
    """The same in the matrix units, inputs rounded in one launch; results in bfloat16."""

    def __init__(self, weight: Tensor, scales: Tensor, bias: Tensor | None, out_dtype: torch.dtype) -> None:
        super().__init__(weight, scales, bias, out_dtype)
        self._quantize = _row_quantizer()

    def __call__(self, x: Tensor) -> Tensor:
        rounded, row_scales = self._quantize(x)
        y = torch._scaled_mm(
            rounded, self._weight.t(), row_scales.unsqueeze(1), self._scales.unsqueeze(0),
            out_dtype=torch.bfloat16, use_fast_accum=True,
        )  # fmt: skip
        return (y if self._bias is None else y + self._bias).to(self._out_dtype)


def _row_quantizer() -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """`quantize_channels` as one kernel, where Triton is installed."""
    try:
        from kernels.triton.rows import quantize_rows
    except ImportError:
        return quantize_channels
    return quantize_rows


def pack_linear_fp8(weight: Tensor, scales: Tensor, bias: Tensor | None, out_dtype: torch.dtype) -> Linear:
    """For the device that ``weight`` is on."""
    even = weight.shape[0] % _MULTIPLE == 0 and weight.shape[1] % _MULTIPLE == 0
    kind = Fp8LinearCuda if weight.is_cuda and even else Fp8Linear
    return kind(weight.contiguous(), scales, bias, out_dtype)
