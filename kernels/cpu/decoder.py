"""A decoder's layers as one call of the native library.

Owns the structures that the call reads; the tensors and packed weights that they point to are kept with them.
Invariant: it computes what :class:`kernels.decoder.LayerByLayer` does on the same kernels, bit for bit.
"""

from __future__ import annotations

import ctypes
from ctypes import c_float, c_int64, c_void_p

import torch
from torch import Tensor

from kernels.cpu.library import Call, Pointer
from kernels.cpu.linear import NativeLinear
from kernels.decoder import DecoderLayer, DecoderWeights


class _Layer(ctypes.Structure):
    _fields_ = tuple(
        (name, c_void_p)
        for name in ("input_norm", "q_norm", "k_norm", "mlp_norm", "qkv", "output", "gate_up", "down")
    )


class _Decoder(ctypes.Structure):
    _fields_ = (
        ("layers", c_void_p),
        ("count", c_int64),
        ("last_norm", c_void_p),
        ("cos_sin", c_void_p),
        ("heads", c_int64),
        ("eps", c_float),
        ("scale", c_float),
    )


class NativeDecoder:
    """``weights`` that `covers` says yes to; ``call`` is the library's function for their dtype."""

    def __init__(self, call: Call, pool: Pointer, weights: DecoderWeights) -> None:
        self._call, self._pool, self._weights = call, pool, weights
        self._layers = (_Layer * len(weights.layers))(*map(_laid_out, weights.layers))
        self._native = _Decoder(
            ctypes.addressof(self._layers), len(weights.layers), weights.last_norm.data_ptr(),
            weights.cos_sin.data_ptr(), weights.num_heads, weights.eps, weights.head_dim**-0.5,
        )  # fmt: skip
        self._address = ctypes.addressof(self._native)
        query, key = (heads * weights.head_dim for heads in (weights.num_heads, weights.num_kv_heads))
        inner = max(layer.down.width_in for layer in weights.layers if isinstance(layer.down, NativeLinear))
        self._room = 2 * (query + key) + max(inner, query + key)  # elements of a row between the linear layers

    def __call__(self, residual: Tensor, kv: int, batch: int) -> Tensor:
        """``kv`` and ``batch`` are addresses of the native structures."""
        rows, hidden = residual.shape
        room = residual.new_empty(rows * self._room)
        out = residual.new_empty((rows, hidden))
        self._call(self._pool, self._address, kv, batch, residual.data_ptr(), room.data_ptr(), out.data_ptr())
        return out


def covers(weights: DecoderWeights, dtype: torch.dtype) -> bool:
    """Whether every layer is packed for the library, with activations of ``dtype`` throughout."""
    tensors = [weights.last_norm]
    for layer in weights.layers:
        norms = (layer.input_norm, layer.q_norm, layer.k_norm, layer.mlp_norm)
        tensors += [norm for norm in norms if norm is not None]
        for linear in (layer.qkv, layer.output, layer.gate_up, layer.down):
            if not isinstance(linear, NativeLinear) or linear.out_dtype is not dtype or linear.width_in % 2:
                return False
    return weights.cos_sin.is_contiguous() and all(t.dtype is dtype and t.is_contiguous() for t in tensors)


def _laid_out(layer: DecoderLayer) -> _Layer:
    linears = (layer.qkv, layer.output, layer.gate_up, layer.down)
    return _Layer(
        layer.input_norm.data_ptr(),
        None if layer.q_norm is None else layer.q_norm.data_ptr(),
        None if layer.k_norm is None else layer.k_norm.data_ptr(),
        layer.mlp_norm.data_ptr(),
        *(linear.address for linear in linears if isinstance(linear, NativeLinear)),
    )
