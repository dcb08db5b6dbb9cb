"""A pool in memory that only explicit copies reach, as a GPU's is, and a UCX that carries it: doubles for tests.

The pool's addresses are those of the host, which is what a UCX without a GPU takes every address for.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from kvtransfer import UcxTransport
from kvtransfer.checksums import checksum_words
from kvtransfer.ucx_driver import UcxDriver


class CarryingUcx(UcxTransport):
    """Says that it carries device memory."""

    def _running(self) -> UcxDriver:
        driver = super()._running()
        driver.carries_device_memory = True
        return driver


class FakeDevicePool:
    """``copies`` counts the bytes that went each way, ``launches`` the blocks of each call for checksums."""

    def __init__(self, num_blocks: int, block_bytes: int, buffers: int = 4) -> None:
        """``buffers``: so many are there beside the pool."""
        self.buffers = buffers
        self.num_blocks, self.block_bytes = num_blocks, block_bytes
        self.contents = bytearray(num_blocks * block_bytes)
        self.host_bytes = 0
        self.copies = {"out": 0, "in": 0}
        self.launches: list[int] = []
        self.gathered = self.scattered = 0  # blocks

    def address(self) -> int:
        return np.frombuffer(self.contents, dtype=np.uint8).ctypes.data

    def host_buffer(self, num_bytes: int) -> memoryview:
        self.host_bytes += num_bytes
        return memoryview(bytearray(num_bytes))

    def read(self, offsets: Sequence[int], into: Sequence[memoryview]) -> None:
        for offset, buffer in zip(offsets, into, strict=True):
            buffer[:] = self.contents[offset : offset + len(buffer)]
            self.copies["out"] += len(buffer)

    def write(self, offsets: Sequence[int], data: Sequence[memoryview]) -> None:
        for offset, buffer in zip(offsets, data, strict=True):
            self.contents[offset : offset + len(buffer)] = buffer
            self.copies["in"] += len(buffer)

    def device_buffer(self, num_bytes: int) -> tuple[int, bytearray]:
        if self.buffers == 0:
            raise MemoryError("the device is full")
        self.buffers -= 1
        memory = bytearray(num_bytes)
        return np.frombuffer(memory, dtype=np.uint8).ctypes.data, memory

    def gather(self, runs: Sequence[Sequence[int]], into: Sequence[bytearray]) -> None:
        for blocks, buffer in zip(runs, into, strict=True):
            data = b"".join(map(self.block, blocks))
            buffer[: len(data)] = data
            self.gathered += len(blocks)

    def scatter(self, runs: Sequence[Sequence[int]], data: Sequence[bytearray]) -> None:
        size = self.block_bytes
        for blocks, buffer in zip(runs, data, strict=True):
            for place, block in enumerate(blocks):
                self.contents[block * size : (block + 1) * size] = buffer[place * size : (place + 1) * size]
            self.scattered += len(blocks)

    def block(self, index: int) -> bytes:
        return bytes(self.contents[index * self.block_bytes : (index + 1) * self.block_bytes])

    def checksums(self, blocks: Sequence[int], offset: int, length: int) -> list[int]:
        self.launches.append(len(blocks))
        return [checksum_words(memoryview(self.block(b))[offset : offset + length]) for b in blocks]
