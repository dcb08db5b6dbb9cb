"""How one connection reaches the bytes of a pool where they lie.

Host pools, and device pools over a transport that carries device memory, are sent from and received into in
place; kvtransfer/staging.py has the ways through other memory. Knows ranges of bytes, no blocks and no frames.
Invariant: what a loan names stays the connection's until it is released.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol


class DeviceSpan:
    """Bytes in device memory, described as libraries that know CUDA expect it."""

    def __init__(self, address: int, nbytes: int, owner: object) -> None:
        self.nbytes = nbytes
        self.owner = owner  # keeps the memory
        self._address = address

    def __len__(self) -> int:
        return self.nbytes

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        """https://numba.readthedocs.io/en/stable/cuda/cuda_array_interface.html"""
        return {"shape": (self.nbytes,), "typestr": "|u1", "data": (self._address, False), "version": 3}

    def first(self, nbytes: int) -> DeviceSpan:
        """So many bytes of it."""
        assert nbytes <= self.nbytes
        return DeviceSpan(self._address, nbytes, self.owner)


Buffer = memoryview | DeviceSpan
Range = tuple[int, int]  # start and length in bytes


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

    def device_buffer(self, num_bytes: int) -> tuple[int, Any]:
        """Memory beside the pool, on the same device: its address, and what `gather` knows it by. MemoryError."""
        ...

    def gather(self, runs: Sequence[Sequence[int]], into: Sequence[Any]) -> None:
        """Fills each buffer, one of `device_buffer`, with a run of whole blocks."""
        ...

    def scatter(self, runs: Sequence[Sequence[int]], data: Sequence[Any]) -> None:
        """The way back."""
        ...

    def checksums(self, blocks: Sequence[int], offset: int, length: int) -> list[int]:
        """`checksums.checksum_words` of that range of each block."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class Loan:
    """The ranges of the pool that are one payload, and where it is sent from or received into."""

    ranges: Sequence[Range]
    buffer: Buffer

    @property
    def nbytes(self) -> int:
        return len(self.buffer)


class Access(ABC):
    """Of one connection. This base serves pools that are sent from and received into in place, so a payload is one
    range."""

    name: str  # of the way that bytes take, for logs
    gathers: ClassVar[bool] = False  # a payload may have several ranges
    run_bytes: ClassVar[int] = 1 << 20  # of one payload at most, unless a block has more
    first_batch: ClassVar[int] = 2  # blocks announced together at first: bytes flow early
    batch: ClassVar[int] = 32  # the same later on

    @classmethod
    def run_blocks(cls, block_bytes: int) -> int:
        """How many blocks are one payload, at most."""
        return max(1, cls.run_bytes // block_bytes)

    async def lend(self, ranges: Sequence[Range]) -> Loan:
        """To receive one payload into."""
        return self._in_place(ranges)

    async def load(self, payloads: Sequence[Sequence[Range]]) -> list[Loan]:
        """To send from. A payload may come as several, cut between its ranges."""
        return [self._in_place(ranges) for ranges in payloads]

    async def store(self, loans: Sequence[Loan]) -> None:
        """Makes the pool hold what was received."""
        return

    def release(self, loan: Loan) -> None:
        """Nothing is sent from it or received into it any more."""
        return

    def close(self) -> None:
        """Releases all that is lent: the connection is at rest or closed."""
        return

    def _in_place(self, ranges: Sequence[Range]) -> Loan:
        [(start, nbytes)] = ranges
        return Loan(ranges, self._buffer(start, nbytes))

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
    payload and for one launch, so payloads and batches are large (docs/gpu.md)."""

    name = "device memory"
    run_bytes = 64 << 20
    first_batch = 32
    batch = 128

    @classmethod
    def run_blocks(cls, block_bytes: int) -> int:
        return min(cls.first_batch, super().run_blocks(block_bytes))

    def __init__(self, pool: DevicePool) -> None:
        self._pool = pool

    def _buffer(self, start: int, nbytes: int) -> Buffer:
        return DeviceSpan(self._pool.address() + start, nbytes, self._pool)
