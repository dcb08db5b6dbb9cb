"""The KV pool as transfers see it: numbered blocks of bytes.

Knows nothing of tensors. A pool in device memory is another class with these methods.
Invariant: a view that ``block`` returns lies inside that one block.
"""

from __future__ import annotations

from typing import Any

import crc32c

from splitserve.layout import KVLayout


class BlockMemory:
    """A pool in host memory: block ``i`` is the bytes ``[i * block_bytes, (i + 1) * block_bytes)``."""

    def __init__(self, buffer: Any, layout: KVLayout, num_blocks: int) -> None:
        """``buffer``: anything with the buffer protocol, writable, contiguous, ``num_blocks * layout.block_bytes``
        bytes. ValueError otherwise."""
        view = memoryview(buffer)
        if view.readonly or not view.c_contiguous:
            raise ValueError("the pool must be writable and contiguous")
        if view.nbytes != num_blocks * layout.block_bytes:
            raise ValueError(f"the pool has {view.nbytes} bytes, not {num_blocks} blocks of {layout.block_bytes}")
        self._view = view.cast("B")
        self.num_blocks = num_blocks
        self.block_bytes = layout.block_bytes

    def block(self, index: int, offset: int = 0, length: int | None = None) -> memoryview:
        """The bytes ``[offset, offset + length)`` of a block, by default all of it. IndexError if outside."""
        length = self.block_bytes - offset if length is None else length
        if not 0 <= index < self.num_blocks:
            raise IndexError(f"block {index} of {self.num_blocks}")
        if offset < 0 or length < 0 or offset + length > self.block_bytes:
            raise IndexError(f"bytes [{offset}, {offset + length}) of a block of {self.block_bytes}")
        start = index * self.block_bytes + offset
        return self._view[start : start + length]

    def run(self, first: int, count: int) -> memoryview:
        """The bytes of ``count`` blocks that lie behind each other. IndexError if outside."""
        if not 0 <= first < first + count <= self.num_blocks:
            raise IndexError(f"blocks {first} to {first + count} of {self.num_blocks}")
        return self._view[first * self.block_bytes : (first + count) * self.block_bytes]

    def checksum(self, index: int, offset: int = 0, length: int | None = None) -> int:
        """CRC32C of those bytes."""
        return crc32c.crc32c(self.block(index, offset, length))
