"""The KV pool as transfers see it: numbered blocks of bytes.

Knows nothing of tensors. Invariant: a range that ``range`` returns lies inside its blocks.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

from kvtransfer.access import Access, HostAccess
from kvtransfer.checksums import Checksum, checksum_of
from splitserve.layout import KVLayout


class Blocks(ABC):
    """Block ``i`` is the bytes ``[i * block_bytes, (i + 1) * block_bytes)`` of a pool, wherever that is."""

    kinds: ClassVar[tuple[Checksum, ...]]  # checksums that it has, in order of preference

    def __init__(self, num_blocks: int, block_bytes: int) -> None:
        self.num_blocks = num_blocks
        self.block_bytes = block_bytes

    def range(self, first: int, count: int = 1, offset: int = 0, length: int | None = None) -> tuple[int, int]:
        """Start and length of so many blocks that lie behind each other, or of a part of one. IndexError if
        outside."""
        length = self.block_bytes - offset if length is None else length
        if not 0 <= first < first + count <= self.num_blocks:
            raise IndexError(f"blocks {first} to {first + count} of {self.num_blocks}")
        if offset < 0 or length < 0 or offset + length > self.block_bytes:
            raise IndexError(f"bytes [{offset}, {offset + length}) of a block of {self.block_bytes}")
        assert count == 1 or length == self.block_bytes
        return first * self.block_bytes + offset, count * length

    def ranges(self, blocks: Sequence[int], offset: int = 0, length: int | None = None) -> list[tuple[int, int]]:
        """The same range of each block, in order; whole blocks that lie behind each other as one. IndexError."""
        found: list[tuple[int, int]] = []
        for block in blocks:
            start, nbytes = self.range(block, 1, offset, length)
            if found and nbytes == self.block_bytes and sum(found[-1]) == start:
                found[-1] = (found[-1][0], found[-1][1] + nbytes)
            else:
                found.append((start, nbytes))
        return found

    @abstractmethod
    def access(self, carries_device_memory: bool) -> Access:
        """For a connection over a transport that does, or doesn't."""

    @abstractmethod
    async def checksums(self, kind: Checksum, blocks: Sequence[int], offset: int, length: int) -> list[int]:
        """Of the same range of each block; ``kind`` is one of ``kinds``."""


class BlockMemory(Blocks):
    """A pool in host memory."""

    kinds = (Checksum.CRC32C, Checksum.WORDS)

    def __init__(self, buffer: Any, layout: KVLayout, num_blocks: int) -> None:
        """``buffer``: anything with the buffer protocol, writable, contiguous, ``num_blocks * layout.block_bytes``
        bytes. ValueError otherwise."""
        view = memoryview(buffer)
        if view.readonly or not view.c_contiguous:
            raise ValueError("the pool must be writable and contiguous")
        if view.nbytes != num_blocks * layout.block_bytes:
            raise ValueError(f"the pool has {view.nbytes} bytes, not {num_blocks} blocks of {layout.block_bytes}")
        super().__init__(num_blocks, layout.block_bytes)
        self._view = view.cast("B")

    def access(self, carries_device_memory: bool) -> Access:
        return HostAccess(self._view)

    async def checksums(self, kind: Checksum, blocks: Sequence[int], offset: int, length: int) -> list[int]:
        starts = [self.range(block, 1, offset, length)[0] for block in blocks]
        return [checksum_of(kind, self._view[start : start + length]) for start in starts]
