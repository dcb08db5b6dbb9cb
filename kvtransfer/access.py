"""How one connection reaches the bytes of a pool: where they lie, or through pinned host memory.

Host pools, and device pools over a transport that carries device memory, are sent from and received into in
place. Else a range passes through a slot of host memory: `load` fills it before it is sent, `store` empties it
behind it. Knows ranges of bytes, no blocks and no frames. Invariant: a slot belongs to one loan until its
release.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from kvtransfer.tasks import uninterrupted


class DeviceSpan:
    """Bytes in device memory, described as libraries that know CUDA expect it."""

    def __init__(self, address: int, nbytes: int, owner: object) -> None:
        self.nbytes = nbytes
        self._address, self._owner = address, owner  # the owner keeps the memory

    def __len__(self) -> int:
        return self.nbytes

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        """https://numba.readthedocs.io/en/stable/cuda/cuda_array_interface.html"""
        return {"shape": (self.nbytes,), "typestr": "|u1", "data": (self._address, False), "version": 3}


Buffer = memoryview | DeviceSpan


class DevicePool(Protocol):
    """A pool in device memory. What copies or computes returns when it is done, which may take milliseconds, and
    may be called from any thread. Offsets are in bytes from the pool's start."""

    num_blocks: int
    block_bytes: int

    def address(self) -> int:
        """Of the first byte."""
        ...

    def host_buffer(self, num_bytes: int) -> memoryview:
        """Host memory that the device copies to and from by itself."""
        ...

    def read(self, offsets: Sequence[int], into: Sequence[memoryview]) -> None:
        """Fills each buffer from its offset."""
        ...

    def write(self, offsets: Sequence[int], data: Sequence[memoryview]) -> None:
        """The way back."""
        ...

    def checksums(self, blocks: Sequence[int], offset: int, length: int) -> list[int]:
        """`checksums.checksum_words` of that range of each block."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class Loan:
    """Bytes ``[start, start + nbytes)`` of the pool, and where they are sent from or received into."""

    start: int
    nbytes: int
    buffer: Buffer


class Access(ABC):
    """Of one connection. This base serves pools that are sent from and received into in place."""

    name: str  # of the way that bytes take, for logs
    run_bytes: ClassVar[int] = 1 << 20  # of one payload at most, unless a block has more
    first_batch: ClassVar[int] = 2  # blocks announced together at first: bytes flow early
    batch: ClassVar[int] = 32  # the same later on

    @classmethod
    def run_blocks(cls, block_bytes: int) -> int:
        """How many blocks are one payload, at most."""
        return max(1, cls.run_bytes // block_bytes)

    def lend(self, start: int, nbytes: int) -> Loan:
        """To receive into."""
        return Loan(start, nbytes, self._buffer(start, nbytes))

    async def load(self, ranges: Sequence[tuple[int, int]]) -> list[Loan]:
        """To send from: start and length of each."""
        return [self.lend(start, nbytes) for start, nbytes in ranges]

    async def store(self, loans: Sequence[Loan]) -> None:
        """Makes the pool hold what was received."""
        return

    def release(self, loan: Loan) -> None:
        """Nothing is sent from it or received into it any more."""
        return

    def close(self) -> None:
        """Releases all that is lent: the connection is at rest or closed."""
        return

    @abstractmethod
    def _buffer(self, start: int, nbytes: int) -> Buffer: ...


class HostAccess(Access):
    name = "host memory"

    def __init__(self, view: memoryview) -> None:
        self._view = view

    def _buffer(self, start: int, nbytes: int) -> Buffer:
        return self._view[start : start + nbytes]


class StraightAccess(Access):
    """Device memory, for a transport that carries it. A GPU copies 64 MiB in the time that the host takes for one
    payload and for one launch, so a payload and a batch are that large (docs/gpu.md)."""

    name = "device memory"
    run_bytes = 64 << 20
    first_batch = 32
    batch = 128

    def __init__(self, pool: DevicePool) -> None:
        self._pool = pool

    def _buffer(self, start: int, nbytes: int) -> Buffer:
        return DeviceSpan(self._pool.address() + start, nbytes, self._pool)


class Slots:
    """Pinned host memory in slots of one size, allocated some at a time and kept; one for all connections."""

    CHUNK = 16  # slots

    def __init__(self, pool: DevicePool, slot_bytes: int) -> None:
        self.slot_bytes = slot_bytes
        self._pool = pool
        self._free: list[memoryview] = []

    @property
    def num_free(self) -> int:
        return len(self._free)

    def take(self) -> memoryview:
        if not self._free:
            size = self.slot_bytes
            chunk = self._pool.host_buffer(size * self.CHUNK)
            self._free = [chunk[i * size : (i + 1) * size] for i in range(self.CHUNK)]
        return self._free.pop()

    def give_back(self, slot: memoryview) -> None:
        self._free.append(slot)


class StagedAccess(Access):
    """Device memory, for a transport that knows host memory alone."""

    name = "device memory by way of pinned host memory"

    def __init__(self, pool: DevicePool, slots: Slots) -> None:
        self._pool, self._slots = pool, slots
        self._lent: dict[Loan, memoryview] = {}

    def lend(self, start: int, nbytes: int) -> Loan:
        loan = Loan(start, nbytes, (slot := self._slots.take())[:nbytes])
        self._lent[loan] = slot
        return loan

    async def load(self, ranges: Sequence[tuple[int, int]]) -> list[Loan]:
        loans = [self.lend(start, nbytes) for start, nbytes in ranges]
        await self._copy(self._pool.read, loans)
        return loans

    async def store(self, loans: Sequence[Loan]) -> None:
        await self._copy(self._pool.write, loans)

    async def _copy(self, copy: Any, loans: Sequence[Loan]) -> None:
        """In a thread, and to its end: a slot must not have another owner meanwhile."""
        buffers = [loan.buffer for loan in loans]
        await uninterrupted(asyncio.to_thread(copy, [loan.start for loan in loans], buffers))

    def release(self, loan: Loan) -> None:
        slot = self._lent.pop(loan, None)
        if slot is not None:
            self._slots.give_back(slot)

    def close(self) -> None:
        for loan in list(self._lent):
            self.release(loan)

    def _buffer(self, start: int, nbytes: int) -> Buffer:
        raise AssertionError("staged ranges are lent slots")
