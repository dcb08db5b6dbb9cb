"""Pulls between pools of which one or both are in device memory, over transports that carry host memory alone."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager

import numpy as np
import pytest

from kvtransfer import BlockMemory, BlockServer, DeviceBlocks, MemoryTransport, PullClient, TcpTransport
from kvtransfer.access import Slots
from kvtransfer.blocks import Blocks
from kvtransfer.faulty import Fault, FaultyTransport
from kvtransfer.transport import Transport
from splitserve.errors import TransferFailed
from tests.kvtransfer.conftest import BLOCKS, FINGERPRINT, LAYOUT
from tests.kvtransfer.device_double import FakeDevicePool

SIZE = LAYOUT.block_bytes
Ends = tuple[BlockServer, PullClient]
MakeEnds = Callable[..., AbstractAsyncContextManager[Ends]]


class Pool:
    """In host memory or in a device's, with its contents to look at."""

    def __init__(self, on_device: bool, seed: int | None = None) -> None:
        contents = bytes(BLOCKS * SIZE) if seed is None else random.Random(seed).randbytes(BLOCKS * SIZE)
        self.device = FakeDevicePool(BLOCKS, SIZE)
        self.blocks: Blocks
        if on_device:
            self.device.contents[:] = contents
            self.memory = np.frombuffer(self.device.contents, dtype=np.uint8).reshape(BLOCKS, SIZE)
            self.blocks = DeviceBlocks(self.device)
        else:
            self.memory = np.frombuffer(bytearray(contents), dtype=np.uint8).reshape(BLOCKS, SIZE)
            self.blocks = BlockMemory(self.memory, LAYOUT, BLOCKS)


@pytest.fixture(params=["memory", "tcp"])
def make_ends(request: pytest.FixtureRequest) -> MakeEnds:
    @asynccontextmanager
    async def make(source: Pool, target: Pool, fault: Fault | None = None) -> AsyncIterator[Ends]:
        one: Transport = MemoryTransport() if request.param == "memory" else TcpTransport()
        two: Transport = one if request.param == "memory" else TcpTransport()
        server = BlockServer(
            source.blocks, FINGERPRINT, "p0", 1, [one if fault is None else FaultyTransport(one, fault)]
        )
        async with server, PullClient(target.blocks, FINGERPRINT, "d0", 2, [two]) as client:
            yield server, client

    return make


async def pull(ends: Ends, sent: list[int], received: list[int]) -> None:
    server, client = ends
    publication = server.publish(len(sent))
    publication.ready(sent[:5])
    task = asyncio.create_task(client.pull(publication.handle, received))
    publication.ready(sent[5:])
    publication.finish(7, finished=False)
    try:
        assert (await task).first_token == 7
    finally:
        async with asyncio.timeout(30):
            publication.release_reason or publication.fail("over")
            await publication.released()


@pytest.mark.parametrize(("from_device", "to_device"), [(True, True), (True, False), (False, True)])
async def test_blocks_arrive_whole_between_any_two_pools(
    make_ends: MakeEnds, from_device: bool, to_device: bool
) -> None:
    source, target = Pool(from_device, seed=1), Pool(to_device)
    sent, received = [*range(3, 20), 40, 30, 31], [*range(20, 30), 2, 3, 4, 8, *range(10, 16)]
    async with make_ends(source, target) as ends:
        await pull(ends, sent, received)
    assert np.array_equal(target.memory[received], source.memory[sent])
    assert not target.memory[[i for i in range(BLOCKS) if i not in received]].any()
    assert source.device.copies["out"] == (len(sent) * SIZE if from_device else 0)
    assert target.device.copies["in"] == (len(sent) * SIZE if to_device else 0)


async def test_a_block_that_was_damaged_on_its_way_is_sent_again(make_ends: MakeEnds) -> None:
    damaged = []

    def fault(slot: int, data: memoryview) -> memoryview:
        if not damaged:
            damaged.append(slot)
            return memoryview(bytes(len(data)))
        return data

    source, target = Pool(True, seed=2), Pool(True)
    async with make_ends(source, target, fault) as ends:
        await pull(ends, list(range(12)), list(range(12)))
    assert np.array_equal(target.memory[:12], source.memory[:12])


async def test_slots_are_given_back_whatever_the_end(make_ends: MakeEnds) -> None:
    source, target = Pool(True, seed=3), Pool(True)
    async with make_ends(source, target, lambda slot, data: memoryview(bytes(len(data)))) as ends:
        for _ in range(8):
            with pytest.raises(TransferFailed, match="damaged twice"):
                await pull(ends, list(range(9)), list(range(9)))
    chunk = Slots.CHUNK * max(SIZE, (2 << 20) // SIZE * SIZE)
    assert source.device.host_bytes <= chunk and target.device.host_bytes <= chunk
