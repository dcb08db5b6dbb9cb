"""The shared library's face in Python: structures as C lays them out, and functions with their types bound.

Knows signatures; holds no tensors. One :class:`Functions` per dtype, so that a call has nothing to look up.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from ctypes import c_float, c_int, c_int64, c_long, c_uint64, c_void_p
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Pointer = int | None  # an address, as ``Tensor.data_ptr()`` gives it
Call = Callable[..., Any]


class KvPool(ctypes.Structure):
    """A pool ``[blocks, Hkv, L, 2, B, D]``; strides in elements."""

    _fields_ = (
        ("data", c_void_p),
        ("block_stride", c_int64),
        ("head_stride", c_int64),
        ("layer_stride", c_int64),
        ("kv_heads", c_int64),
        ("block_tokens", c_int64),
        ("head_dim", c_int64),
    )


class Batch(ctypes.Structure):
    """The tensors of an ``AttentionBatch``."""

    _fields_ = (
        ("positions", c_void_p),
        ("slots", c_void_p),
        ("query_start", c_void_p),
        ("context_lens", c_void_p),
        ("block_tables", c_void_p),
        ("table_stride", c_int64),
        ("rows", c_int64),
        ("sequences", c_int64),
        ("decodes", c_int64),
    )


class PackedLinear(ctypes.Structure):
    """Panels of a weight ``[n, k]`` with what belongs to them."""

    _fields_ = (
        ("weight", c_void_p),
        ("bias", c_void_p),
        ("scales", c_void_p),
        ("n", c_int64),
        ("k", c_int64),
        ("gated", c_int64),
    )


_ATTENTION = (c_void_p, c_void_p, c_void_p, c_long, c_void_p, c_long, c_long, c_float, c_void_p)
_SIGNATURES = {  # pool first, as everywhere
    "linear": (c_void_p, c_void_p, c_void_p, c_long, c_long, c_void_p),
    "linear_wide": (c_void_p, c_void_p, c_void_p, c_long, c_long, c_void_p),
    "linear_int8": (c_void_p, c_void_p, c_void_p, c_long, c_long, c_void_p),
    "linear_int8_wide": (c_void_p, c_void_p, c_void_p, c_long, c_long, c_void_p),
    "rms_norm": (
        c_void_p, c_void_p, c_long, c_long, c_long, c_void_p, c_float, c_long, c_long, c_void_p,
    ),
    "add_rms_norm": (c_void_p, c_void_p, c_void_p, c_void_p, c_float, c_long, c_long, c_void_p),
    "silu_mul": (c_void_p, c_void_p, c_long, c_long, c_long, c_void_p),
    "rope_kv_write": (
        c_void_p, c_void_p, c_long, c_long, c_void_p, c_long, c_void_p, c_long, c_void_p, c_void_p, c_long,
        c_void_p,
    ),
    "decode": _ATTENTION,
    "chunks": _ATTENTION,
    "decoder": (c_void_p,) * 7,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Functions:
    """The kernels for one dtype; all but ``pack`` take the pool first. The C sources describe each."""

    pack: Call
    linear: Call
    linear_wide: Call  # results in float32
    linear_int8: Call
    linear_int8_wide: Call
    rms_norm: Call
    add_rms_norm: Call
    silu_mul: Call
    rope_kv_write: Call
    decode: Call
    chunks: Call
    decoder: Call


class Library:
    """A loaded shared library. Raises OSError if it can't be loaded or the system withholds its instructions."""

    def __init__(self, path: Path) -> None:
        self._dll = ctypes.CDLL(str(path))
        if self._dll.ss_prepare() != 0:
            raise OSError(f"{path.name}: the system does not grant the instructions that it needs")
        self._bind("ss_keep_memory", ())()
        self.pool_create = self._bind("ss_pool_create", (c_int, c_void_p, c_void_p, c_int, c_int), c_void_p)
        self.pool_destroy = self._bind("ss_pool_destroy", (c_void_p,))
        self.read_memory = self._bind("ss_read_memory", (c_void_p, c_void_p, c_long), c_uint64)
        self.argmax = self._bind("ss_argmax", (c_void_p, c_void_p, c_long, c_long, c_void_p))
        self.pack_int8 = self._bind("ss_pack_int8", (c_void_p, c_long, c_long, c_long, c_void_p, c_void_p))
        self.float32 = self._functions("f32")
        self.bfloat16 = self._functions("bf16")

    def _functions(self, suffix: str) -> Functions:
        bound = {name: self._bind(f"ss_{name}_{suffix}", types) for name, types in _SIGNATURES.items()}
        pack = self._bind(f"ss_pack_{suffix}", (c_void_p, c_long, c_long, c_long, c_void_p))
        return Functions(pack=pack, **bound)

    def _bind(self, name: str, arguments: tuple[Any, ...], result: Any = None) -> Call:
        function = getattr(self._dll, name)
        function.argtypes, function.restype = arguments, result
        return function  # type: ignore[no-any-return]
