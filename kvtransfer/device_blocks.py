"""A KV pool in device memory as transfers see it.

Knows the pool by `DevicePool` alone and no CUDA library. Invariant: bytes of a block pass through host memory only
where the connection's transport can't carry device memory.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence

from kvtransfer.access import Access, DevicePool, DeviceSpan, StraightAccess
from kvtransfer.blocks import Blocks
from kvtransfer.checksums import Checksum
from kvtransfer.slots import Slots
from kvtransfer.staging import GatheringAccess, StagedAccess, pinned_slots
from kvtransfer.tasks import uninterrupted

logger = logging.getLogger(__name__)

SLOTS = StraightAccess.batch // StraightAccess.first_batch  # payloads beside the pool: those of one batch


class DeviceBlocks(Blocks):
    kinds = (Checksum.WORDS,)

    def __init__(self, pool: DevicePool) -> None:
        super().__init__(pool.num_blocks, pool.block_bytes)
        self._pool = pool
        self._pinned = pinned_slots(pool, StagedAccess.run_blocks(pool.block_bytes) * pool.block_bytes)
        self._beside: Slots[DeviceSpan] | None = None

    def access(self, carries_device_memory: bool) -> Access:
        if not carries_device_memory:
            return StagedAccess(self._pool, self._pinned)
        if self._beside is None:
            self._beside = self._allocate()
        return GatheringAccess(self._pool, self._beside) if self._beside.made else StraightAccess(self._pool)

    def _allocate(self) -> Slots[DeviceSpan]:
        size = StraightAccess.run_blocks(self.block_bytes) * self.block_bytes
        spans = []
        try:
            for _ in range(SLOTS):
                address, owner = self._pool.device_buffer(size)
                spans.append(DeviceSpan(address, size, owner))
        except MemoryError as error:
            logger.warning("memory for %d of %d payloads beside the pool: %s", len(spans), SLOTS, error)
        return Slots(spans)

    async def checksums(self, kind: Checksum, blocks: Sequence[int], offset: int, length: int) -> list[int]:
        assert kind in self.kinds
        return await uninterrupted(asyncio.to_thread(self._pool.checksums, blocks, offset, length))
