"""A KV pool in device memory as transfers see it.

Knows the pool by `DevicePool` alone and no CUDA library. Invariant: bytes of a block pass through host memory only
where the connection's transport can't carry device memory.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from kvtransfer.access import Access, DevicePool, Slots, StagedAccess, StraightAccess
from kvtransfer.blocks import Blocks
from kvtransfer.checksums import Checksum
from kvtransfer.tasks import uninterrupted


class DeviceBlocks(Blocks):
    kinds = (Checksum.WORDS,)

    def __init__(self, pool: DevicePool) -> None:
        super().__init__(pool.num_blocks, pool.block_bytes)
        self._pool = pool
        self._slots = Slots(pool, StagedAccess.run_blocks(pool.block_bytes) * pool.block_bytes)

    def access(self, carries_device_memory: bool) -> Access:
        return StraightAccess(self._pool) if carries_device_memory else StagedAccess(self._pool, self._slots)

    async def checksums(self, kind: Checksum, blocks: Sequence[int], offset: int, length: int) -> list[int]:
        assert kind in self.kinds
        return await uninterrupted(asyncio.to_thread(self._pool.checksums, blocks, offset, length))
