"""The values of a GGUF file's tensors, whatever the type in which they are stored.

Types of the models that start most often are computed here, twice as fast as by the gguf package, which reads all
others. Layouts: https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h
Knows bytes, no names. Invariant: the bits are those of gguf's float32 values, rounded once to the dtype asked for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.gguf_file import GgufDirectory, StoredTensor

_PIECE_VALUES = 1 << 16  # at a time: in float32 they stay in the second-level cache


@dataclass(frozen=True, slots=True)
class _BlockType:
    values: int  # of a block
    size: int  # of it, in bytes
    read: Callable[[Tensor], Tensor]  # [n, size] uint8 -> [n, values] float32, or of the type as stored


def dequantized(file: GgufDirectory, tensor: StoredTensor, dtype: torch.dtype) -> Tensor:
    """The values in the tensor's shape. Raises ValueError for a damaged file, and what gguf does for a type that
    it can't read."""
    kind = _TYPES.get(tensor.kind) or _read_by_gguf(tensor.kind)
    count, rest = divmod(math.prod(tensor.shape), kind.values)
    if rest:
        raise ValueError(f"{math.prod(tensor.shape)} values in blocks of {kind.values}")
    blocks = file.data(tensor.offset, count * kind.size).reshape(count, kind.size)
    weight = torch.empty(count, kind.values, dtype=dtype)
    step = _PIECE_VALUES // kind.values
    for first in range(0, count, step):
        piece = torch.from_numpy(blocks[first : first + step].copy())  # torch takes no read-only memory
        weight[first : first + step] = kind.read(piece)
    return weight.reshape(tensor.shape)


def _f32(blocks: Tensor) -> Tensor:
    return blocks.view(torch.float32)


def _q4_1(blocks: Tensor) -> Tensor:
    """Scale and least value in float16, then 32 numbers of 4 bits: 16 low halves of bytes, 16 high ones."""
    head = blocks[:, :4].contiguous().view(torch.float16).float()
    numbers = torch.cat((blocks[:, 4:] & 15, blocks[:, 4:] >> 4), dim=1)
    return numbers.float().mul_(head[:, :1]).add_(head[:, 1:])


def _q8_0(blocks: Tensor) -> Tensor:
    """A scale in float16, then 32 numbers of 8 bits."""
    scale = blocks[:, :2].contiguous().view(torch.float16).float()
    return blocks[:, 2:].view(torch.int8).float().mul_(scale)


_TYPES: Mapping[int, _BlockType] = {  # as ggml numbers them
    0: _BlockType(1, 4, _f32),
    3: _BlockType(32, 20, _q4_1),
    8: _BlockType(32, 34, _q8_0),
}


def _read_by_gguf(number: int) -> _BlockType:
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
    from gguf.quants import dequantize

    kind = GGMLQuantizationType(number)
    values, size = GGML_QUANT_SIZES[kind]

    def read(blocks: Tensor) -> Tensor:
        # As one row: of short ones gguf would take 16 at a time.
        return torch.from_numpy(dequantize(blocks.numpy().reshape(1, -1), kind)).view(-1, values)

    return _BlockType(values, size, read)
