"""A KV pool in device memory as transfers see it.

Knows the pool by `DevicePool` alone and no CUDA library. Invariant: bytes of a block pass through host memory only
where the connection's transport can't carry device memory.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from kvtransfer.access import Access, DevicePool, Slots, StagedAccess, StraightAccess
from kvtransfer.checksums import Checksum
from kvtransfer.tasks import uninterrupted


class DeviceBlocks:
    """Stands where a `BlockMemory` stands."""

    kinds = (Checksum.WORDS,)  # in order of preference

    def __init__(self, pool: DevicePool, slot_bytes: int) -> None:
        """``slot_bytes``: of the longest payload."""
        self.num_blocks, self.block_bytes = pool.num_blocks, pool.block_bytes
        self._pool = pool
        self._slots = Slots(pool, slot_bytes)

    def access(self, takes_device_memory: bool) -> Access:
        """For a connection over a transport that does, or doesn't."""
        return StraightAccess(self._pool) if takes_device_memory else StagedAccess(self._pool, self._slots)

    async def checksums(self, kind: Checksum, blocks: Sequence[int], offset: int, length: int) -> list[int]:
        """Of the same range of each block, on the device."""
        assert kind in self.kinds
        return await uninterrupted(asyncio.to_thread(self._pool.checksums, blocks, offset, length))
