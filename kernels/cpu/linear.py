"""Linear layers whose weights the native kernels read from panels, packed once.

Owns the packed copy; the caller drops its own. Invariant: every call's rows are read in place and the result is
a fresh, contiguous tensor.
"""

from __future__ import annotations

from ctypes import addressof

import torch
from torch import Tensor

from kernels.cpu.library import Call, Functions, Library, PackedLinear, Pointer

PANEL = 32  # outputs of a panel


class NativeLinear:
    """``x @ weight.T + bias`` from packed panels; made by :func:`pack` and :func:`pack_int8`."""

    def __init__(self, call: Call, pool: Pointer, panels: Tensor, layer: PackedLinear, *keep: Tensor) -> None:
        """``call`` is one of the library's linear functions; ``keep`` are tensors that ``layer`` points to."""
        self._call, self._pool, self._layer = call, pool, layer
        self._panels, self._keep = panels, keep
        self._address = addressof(layer)
        self._n, self._k = int(layer.n), int(layer.k)

    def __call__(self, x: Tensor) -> Tensor:
        """``x [T, K]`` -> ``[T, N]``."""
        rows, width = x.shape
        if width != self._k:
            raise ValueError(f"rows of {width} values, the weight takes {self._k}")
        row, step = x.stride()
        if step != 1 or row % 2:
            x = x.contiguous()
            row = width
        out = x.new_empty((rows, self._n))
        self._call(self._pool, self._address, x.data_ptr(), row, rows, out.data_ptr())
        return out


def pack(functions: Functions, pool: Pointer, weight: Tensor, bias: Tensor | None) -> NativeLinear:
    """``weight [N, K]`` (bfloat16: K even) and ``bias [N]`` of the functions' dtype."""
    n, k = weight.shape
    source = weight.contiguous()
    panels = torch.empty(-(-n // PANEL) * PANEL * k, dtype=weight.dtype)
    functions.pack(source.data_ptr(), n, k, panels.data_ptr())
    kept = () if bias is None else (bias.contiguous(),)
    layer = PackedLinear(panels.data_ptr(), kept[0].data_ptr() if kept else None, None, n, k)
    return NativeLinear(functions.linear, pool, panels, layer, *kept)


def pack_int8(
    library: Library, functions: Functions, pool: Pointer, weight: Tensor, bias: Tensor | None
) -> NativeLinear:
    """``weight [N, K]``, K a multiple of 4, rounded to int8 with one symmetric scale per output.

    ``bias`` and the activations keep the functions' dtype."""
    n, k = weight.shape
    source = weight.float().contiguous()
    panels = torch.empty(-(-n // PANEL) * PANEL * k, dtype=torch.uint8)
    scales = torch.empty(n, dtype=torch.float32)
    library.pack_int8(source.data_ptr(), n, k, panels.data_ptr(), scales.data_ptr())
    kept = () if bias is None else (bias.contiguous(),)
    address = kept[0].data_ptr() if kept else None
    layer = PackedLinear(panels.data_ptr(), address, scales.data_ptr(), n, k)
    return NativeLinear(functions.linear_int8, pool, panels, layer, scales, *kept)
