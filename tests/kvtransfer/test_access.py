"""Blocks in device memory: straight to transports that carry it, through pinned slots for the others."""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import Sequence

import crc32c
import pytest

from kvtransfer.access import DeviceSpan, HostAccess, Loan
from kvtransfer.checksums import Checksum, all_of, checksum_of, checksum_words, first_common
from kvtransfer.device_blocks import DeviceBlocks
from kvtransfer.slots import Slots
from kvtransfer.staging import CHUNK, GatheringAccess, StagedAccess, pinned_slots
from tests.kvtransfer.device_double import FakeDevicePool

BLOCK = 64


@pytest.fixture
def pool() -> FakeDevicePool:
    pool = FakeDevicePool(40, BLOCK)
    pool.contents[:] = random.Random(0).randbytes(40 * BLOCK)
    return pool


@pytest.fixture
def slots(pool: FakeDevicePool) -> Slots[memoryview]:
    return pinned_slots(pool, 2 * BLOCK)


def as_bytes(loan: Loan) -> bytes:
    assert isinstance(loan.buffer, memoryview)
    return bytes(loan.buffer)


async def test_what_is_loaded_is_what_the_pool_holds(pool: FakeDevicePool, slots: Slots[memoryview]) -> None:
    loans = await StagedAccess(pool, slots).load([[(448, 64)], [(8, 50), (200, 50)]])
    assert [as_bytes(loan) for loan in loans] == [
        bytes(pool.contents[448:512]),
        bytes(pool.contents[8:58] + pool.contents[200:250]),
    ]


async def test_what_is_stored_changes_its_range_alone(pool: FakeDevicePool, slots: Slots[memoryview]) -> None:
    access, expected = StagedAccess(pool, slots), bytearray(pool.contents)
    loan = await access.lend([(320, 60), (100, 4)])
    assert isinstance(loan.buffer, memoryview)
    loan.buffer[:] = b"x" * 60 + b"yyyy"
    expected[320:380], expected[100:104] = b"x" * 60, b"yyyy"
    assert pool.contents != expected
    await access.store([loan])
    assert pool.contents == expected


async def test_released_slots_serve_again_and_memory_stops_growing(
    pool: FakeDevicePool, slots: Slots[memoryview]
) -> None:
    for i in range(20):
        access = StagedAccess(pool, slots)
        for loan in await access.load([[((i + j) % 40 * BLOCK, BLOCK)] for j in range(CHUNK)]):
            access.release(loan)
            access.release(loan)  # once is enough, twice is harmless
    assert pool.host_bytes == CHUNK * 2 * BLOCK
    assert slots.num_free == CHUNK


async def test_two_loans_of_one_range_have_a_slot_each(pool: FakeDevicePool, slots: Slots[memoryview]) -> None:
    access = StagedAccess(pool, slots)
    [one, other] = await access.load([[(0, BLOCK)], [(0, BLOCK)]])
    access.release(one)
    [third] = await access.load([[(BLOCK, BLOCK)]])
    assert as_bytes(other) == pool.block(0) and as_bytes(third) == pool.block(1)


async def test_closing_gives_everything_back(pool: FakeDevicePool, slots: Slots[memoryview]) -> None:
    access = StagedAccess(pool, slots)
    for i in range(3):
        await access.lend([(i * BLOCK, BLOCK)])
    access.close()
    assert slots.num_free == CHUNK


async def test_a_cancelled_copy_keeps_its_slot_to_the_end(pool: FakeDevicePool, slots: Slots[memoryview]) -> None:
    started, go_on = threading.Event(), threading.Event()

    def slow_read(offsets: Sequence[int], into: Sequence[memoryview]) -> None:
        started.set()
        assert go_on.wait(30)
        into[0][:] = b"y" * len(into[0])

    pool.read = slow_read  # type: ignore[method-assign]
    access = StagedAccess(pool, slots)
    loading = asyncio.create_task(access.load([[(0, BLOCK)]]))
    await asyncio.to_thread(started.wait, 30)
    loading.cancel()
    await asyncio.sleep(0.01)
    assert not loading.done() and slots.num_free == CHUNK - 1
    go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await loading
    access.close()
    assert slots.num_free == CHUNK


def beside(pool: FakeDevicePool, count: int) -> Slots[DeviceSpan]:
    buffers = [pool.device_buffer(4 * BLOCK) for _ in range(count)]
    return Slots([DeviceSpan(address, 4 * BLOCK, owner) for address, owner in buffers])


async def test_blocks_that_lie_apart_are_copied_together_and_apart_again(pool: FakeDevicePool) -> None:
    source, target = GatheringAccess(pool, beside(pool, 2)), FakeDevicePool(40, BLOCK)
    [loan, direct] = await source.load([[(0, 2 * BLOCK), (7 * BLOCK, BLOCK)], [(3 * BLOCK, BLOCK)]])
    assert loan.nbytes == 3 * BLOCK and isinstance(loan.buffer, DeviceSpan)
    assert isinstance(direct.buffer, DeviceSpan) and direct.buffer.owner is pool
    assert pool.gathered == 3
    access = GatheringAccess(target, slots := beside(target, 1))
    received = await access.lend([(5 * BLOCK, BLOCK), (30 * BLOCK, 2 * BLOCK)])
    assert isinstance(received.buffer, DeviceSpan)
    received.buffer.owner[:] = loan.buffer.owner
    await access.store([received])
    assert [target.block(i) for i in (5, 30, 31)] == [pool.block(i) for i in (0, 1, 7)]
    access.release(received)
    assert slots.num_free == 1


async def test_who_gets_no_memory_in_time_sends_each_range_by_itself(pool: FakeDevicePool) -> None:
    slots = beside(pool, 1)
    held = await slots.take()
    access = GatheringAccess(pool, slots)
    loans = await access.load([[(0, BLOCK), (5 * BLOCK, BLOCK)]])
    assert [loan.nbytes for loan in loans] == [BLOCK, BLOCK] and pool.gathered == 0
    slots.give_back(held)
    assert len(await access.load([[(0, BLOCK), (5 * BLOCK, BLOCK)]])) == 1
    access.close()
    assert slots.num_free == 1


async def test_whoever_waits_for_a_slot_gets_it(pool: FakeDevicePool) -> None:
    slots = Slots([1])
    await slots.take()
    waiting = [asyncio.create_task(slots.take()) for _ in range(3)]
    await asyncio.sleep(0)
    waiting[0].cancel()
    for _ in range(2):
        slots.give_back(1)
        await asyncio.sleep(0.01)
    assert [task.done() for task in waiting] == [True] * 3 and waiting[0].cancelled()


@pytest.mark.parametrize(("buffers", "gathers"), [(0, False), (1, True)])
def test_a_full_device_is_told_once_and_served_with_what_it_has(
    buffers: int, gathers: bool, caplog: pytest.LogCaptureFixture
) -> None:
    blocks = DeviceBlocks(FakeDevicePool(40, BLOCK, buffers))
    assert blocks.access(True).gathers is blocks.access(True).gathers is gathers
    assert caplog.messages == [f"memory for {buffers} of 4 payloads beside the pool: the device is full"]


async def test_straight_access_names_addresses_in_the_pool(pool: FakeDevicePool) -> None:
    span = (await DeviceBlocks(pool).access(True).lend([(3 * BLOCK + 16, 32)])).buffer
    assert isinstance(span, DeviceSpan) and len(span) == span.nbytes == 32
    described = span.__cuda_array_interface__
    assert described["data"] == (pool.address() + 3 * BLOCK + 16, False) and described["shape"] == (32,)


async def test_host_pools_are_lent_in_place() -> None:
    memory = bytearray(256)
    buffer = (await HostAccess(memoryview(memory)).lend([(64, 8)])).buffer
    assert isinstance(buffer, memoryview)
    buffer[:] = b"12345678"
    assert memory[64:72] == b"12345678"


async def test_checksums_of_a_device_are_those_of_its_words(pool: FakeDevicePool) -> None:
    blocks = DeviceBlocks(pool)
    expected = [checksum_words(memoryview(pool.block(b))[4:20]) for b in (2, 6)]
    assert await blocks.checksums(Checksum.WORDS, [2, 6], 4, 16) == expected


def test_two_workers_take_the_first_checksum_that_both_have() -> None:
    host, device = (Checksum.CRC32C, Checksum.WORDS), (Checksum.WORDS,)
    assert first_common(host, all_of(host)) is Checksum.CRC32C
    assert first_common(host, all_of(device)) is first_common(device, all_of(host)) is Checksum.WORDS
    assert first_common(device, Checksum.CRC32C) is None


def test_every_flipped_bit_changes_a_checksum() -> None:
    data = bytearray(random.Random(1).randbytes(48))
    for kind in Checksum:
        known = checksum_of(kind, memoryview(data))
        for bit in range(8 * len(data)):
            data[bit // 8] ^= 1 << bit % 8
            assert checksum_of(kind, memoryview(data)) != known
            data[bit // 8] ^= 1 << bit % 8
    assert checksum_of(Checksum.CRC32C, memoryview(data)) == crc32c.crc32c(data)
