"""Linear layers whose weights the native kernels read from panels, packed once.

Owns the packed copy; the caller drops its own. Invariant: every call's rows are read in place and the result is
a fresh, contiguous tensor.
"""

from __future__ import annotations

from ctypes import addressof

import torch
from torch import Tensor

from kernels.cpu.library import Call, Functions, Library, PackedLinear, Pointer
from kernels.memory import Arena

PANEL = 32  # outputs of a panel


class NativeLinear:
    """``x @ weight.T + bias`` from packed panels; made by :func:`pack` and :func:`pack_int8`."""

    def __init__(
        self, call: Call, pool: Pointer, panels: Tensor, layer: PackedLinear, out_dtype: torch.dtype, *keep: Tensor
    ) -> None:
        """``call`` is one of the library's linear functions; ``keep`` are tensors that ``layer`` points to."""
        self._call, self._pool, self._layer = call, pool, layer
        self._panels, self._keep, self.out_dtype = panels, keep, out_dtype
        self.address = addressof(layer)  # of the native structure
        self._width, self.width_in = int(layer.n) // (2 if layer.gated else 1), int(layer.k)

    def __call__(self, x: Tensor) -> Tensor:
        """``x [T, K]`` -> ``[T, N]``, or ``[T, N / 2]`` where gated."""
        rows, width = x.shape
        if width != self.width_in:
            raise ValueError(f"rows of {width} values, the weight takes {self.width_in}")
        row, step = x.stride()
        if step != 1 or row % 2:
            x = x.contiguous()
            row = width
        out = x.new_empty((rows, self._width), dtype=self.out_dtype)
        self._call(self._pool, self.address, x.data_ptr(), row, rows, out.data_ptr())
        return out


def pack(
    functions: Functions,
    pool: Pointer,
    memory: Arena,
    weight: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype | None = None,
    *,
    gated: bool = False,
) -> NativeLinear:
    """``weight [N, K]`` (bfloat16: K even), ``bias [N]`` of the functions' dtype; results in ``out_dtype``,
    that one or float32. ``gated``: gates over ups, N a multiple of 64; ``silu(gate) * up`` comes out."""
    n, k = weight.shape
    source = weight.contiguous()
    panels = memory.empty(_padded(n) * k, weight.dtype)
    functions.pack(source.data_ptr(), n, k, gated, panels.data_ptr())
    kept = _bias(bias, gated)
    layer = PackedLinear(panels.data_ptr(), kept[0].data_ptr() if kept else None, None, n, k, gated)
    wide = (out_dtype or weight.dtype) is torch.float32
    call = functions.linear_wide if wide else functions.linear
    return NativeLinear(call, pool, panels, layer, torch.float32 if wide else weight.dtype, *kept)


def pack_int8(
    library: Library,
    functions: Functions,
    pool: Pointer,
    memory: Arena,
    weight: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype | None = None,
    *,
    gated: bool = False,
) -> NativeLinear:
    """``weight [N, K]``, K a multiple of 4, rounded to int8, one symmetric scale per output; else as `pack`."""
    n, k = weight.shape
    source = weight.float().contiguous()
    panels = memory.empty(_padded(n) * k, torch.uint8)
    scales = torch.empty(n, dtype=torch.float32)
    library.pack_int8(source.data_ptr(), n, k, gated, panels.data_ptr(), scales.data_ptr())
    kept = _bias(bias, gated)
    address = kept[0].data_ptr() if kept else None
    layer = PackedLinear(panels.data_ptr(), address, scales.data_ptr(), n, k, gated)
    wide = (out_dtype or weight.dtype) is torch.float32
    call = functions.linear_int8_wide if wide else functions.linear_int8
    return NativeLinear(call, pool, panels, layer, torch.float32 if wide else weight.dtype, scales, *kept)


def _padded(n: int) -> int:
    return -(-n // PANEL) * PANEL


def _bias(bias: Tensor | None, gated: bool) -> tuple[Tensor, ...]:
    """In the order of the panels' columns."""
    if bias is None:
        return ()
    return (bias.view(2, -1, PANEL).transpose(0, 1).reshape(-1) if gated else bias.contiguous(),)
