"""Ways between a device pool and a connection through other memory: of the host, pinned, or more of the device's.

A transport that knows host memory alone gets every payload by way of pinned memory. One that carries device memory
gets blocks that don't lie behind each other by way of a copy on the device, which costs less than a message for
each of them. Knows ranges of bytes and no frames. Invariant: a slot belongs to one loan until its release.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any, Generic

from kvtransfer.access import Access, Buffer, DevicePool, DeviceSpan, Loan, Range, StraightAccess
from kvtransfer.slots import Slot, Slots
from kvtransfer.tasks import uninterrupted

CHUNK = 16  # pinned slots, allocated together
PATIENCE_SECONDS = 0.05  # how long a payload waits for a slot before its ranges are sent one by one


def pinned_slots(pool: DevicePool, slot_bytes: int) -> Slots[memoryview]:
    """As many as are needed."""

    def more() -> list[memoryview]:
        memory = pool.host_buffer(slot_bytes * CHUNK)
        return [memory[i * slot_bytes : (i + 1) * slot_bytes] for i in range(CHUNK)]

    return Slots([], more)


class _SlotAccess(Access, Generic[Slot]):
    """What is lent from ``_slots``, until its release."""

    gathers = True
    _slots: Slots[Slot]
    _lent: dict[Loan, Slot]

    def release(self, loan: Loan) -> None:
        slot = self._lent.pop(loan, None)
        if slot is not None:
            self._slots.give_back(slot)

    def close(self) -> None:
        for loan in list(self._lent):
            self.release(loan)


class StagedAccess(_SlotAccess[memoryview]):
    """Device memory, for a transport that knows host memory alone."""

    name = "device memory by way of pinned host memory"

    def __init__(self, pool: DevicePool, slots: Slots[memoryview]) -> None:
        self._pool, self._slots = pool, slots
        self._lent: dict[Loan, memoryview] = {}

    async def lend(self, ranges: Sequence[Range]) -> Loan:
        slot = await self._slots.take()
        loan = Loan(ranges, slot[: sum(length for _, length in ranges)])
        self._lent[loan] = slot
        return loan

    async def load(self, payloads: Sequence[Sequence[Range]]) -> list[Loan]:
        loans = [await self.lend(ranges) for ranges in payloads]
        await self._copy(self._pool.read, loans)
        return loans

    async def store(self, loans: Sequence[Loan]) -> None:
        await self._copy(self._pool.write, loans)

    async def _copy(self, copy: Any, loans: Sequence[Loan]) -> None:
        """In a thread, and to its end: a slot must not have another owner meanwhile."""
        offsets, parts = [], []
        for loan in loans:
            assert isinstance(loan.buffer, memoryview)
            place = 0
            for start, length in loan.ranges:
                offsets.append(start)
                parts.append(loan.buffer[place : place + length])
                place += length
        await uninterrupted(asyncio.to_thread(copy, offsets, parts))

    def _buffer(self, start: int, nbytes: int) -> Buffer:
        raise AssertionError("staged ranges are lent slots")


class GatheringAccess(_SlotAccess[DeviceSpan], StraightAccess):
    """Device memory, for a transport that carries it. A payload of one range is sent from the pool and received
    into it; the ranges of another one are copied together on the device, and apart again behind it."""

    def __init__(self, pool: DevicePool, slots: Slots[DeviceSpan]) -> None:
        super().__init__(pool)
        self._slots = slots
        self._lent: dict[Loan, DeviceSpan] = {}

    async def lend(self, ranges: Sequence[Range]) -> Loan:
        return self._in_place(ranges) if len(ranges) == 1 else self._beside(ranges, await self._slots.take())

    async def load(self, payloads: Sequence[Sequence[Range]]) -> list[Loan]:
        """Pullers that have stopped may hold all slots: who waits for one in vain sends without."""
        loans = []
        for ranges in payloads:
            try:
                async with asyncio.timeout(PATIENCE_SECONDS):
                    loans.append(await self.lend(ranges))
            except TimeoutError:
                loans += [self._in_place([one]) for one in ranges]
        await self._copy(self._pool.gather, loans)
        return loans

    async def store(self, loans: Sequence[Loan]) -> None:
        await self._copy(self._pool.scatter, loans)

    def _beside(self, ranges: Sequence[Range], slot: DeviceSpan) -> Loan:
        loan = Loan(ranges, slot.first(sum(length for _, length in ranges)))
        self._lent[loan] = slot
        return loan

    async def _copy(self, copy: Any, loans: Sequence[Loan]) -> None:
        """As above."""
        apart = [loan for loan in loans if loan in self._lent]
        if apart:
            runs = [self._blocks(loan.ranges) for loan in apart]
            await uninterrupted(asyncio.to_thread(copy, runs, [self._lent[loan].owner for loan in apart]))

    def _blocks(self, ranges: Sequence[Range]) -> list[int]:
        size = self._pool.block_bytes
        assert all(start % size == length % size == 0 for start, length in ranges)
        return [block for start, length in ranges for block in range(start // size, (start + length) // size)]
