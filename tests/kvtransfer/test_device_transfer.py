"""Pulls between pools of which one or both are in device memory, whether the transport carries that or not."""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial

import numpy as np
import pytest

from kvtransfer import (
    BlockMemory,
    BlockServer,
    DeviceBlocks,
    MemoryTransport,
    PullClient,
    TcpTransport,
    available_transports,
)
from kvtransfer.blocks import Blocks
from kvtransfer.faulty import Fault, FaultyTransport
from kvtransfer.staging import CHUNK
from kvtransfer.transport import Transport
from splitserve.errors import TransferFailed
from tests.kvtransfer.conftest import BLOCKS, FINGERPRINT, LAYOUT
from tests.kvtransfer.device_double import CarryingUcx, FakeDevicePool

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


@asynccontextmanager
async def two_ends(
    name: str, source: Pool, target: Pool, fault: Fault | None = None
) -> AsyncIterator[tuple[BlockServer, PullClient]]:
    one: Transport = {"memory": MemoryTransport, "tcp": TcpTransport, "carrying": CarryingUcx}[name]()
    two = one if name == "memory" else type(one)()
    sender = one if fault is None else FaultyTransport(one, fault)
    server = BlockServer(source.blocks, FINGERPRINT, "p0", 1, [sender])
    async with server, PullClient(target.blocks, FINGERPRINT, "d0", 2, [two]) as client:
        yield server, client
    await two.close()
    await one.close()


needs_ucx = pytest.mark.skipif("ucx" not in available_transports(), reason="ucxx is not installed")


@pytest.fixture(params=["memory", "tcp"])
def make_ends(request: pytest.FixtureRequest) -> MakeEnds:
    return partial(two_ends, request.param)


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


@pytest.mark.parametrize("name", ["memory", "tcp", pytest.param("carrying", marks=needs_ucx)])
@pytest.mark.parametrize(("from_device", "to_device"), [(True, True), (True, False), (False, True)])
async def test_blocks_arrive_whole_between_any_two_pools(name: str, from_device: bool, to_device: bool) -> None:
    source, target = Pool(from_device, seed=1), Pool(to_device)
    sent, received = [*range(3, 20), 40, 30, 31], [*range(20, 30), 2, 3, 4, 8, *range(10, 16)]
    async with two_ends(name, source, target) as ends:
        await pull(ends, sent, received)
    assert np.array_equal(target.memory[received], source.memory[sent])
    assert not target.memory[[i for i in range(BLOCKS) if i not in received]].any()
    staged = len(sent) * SIZE if name != "carrying" else 0
    assert source.device.copies["out"] == (staged if from_device else 0)
    assert target.device.copies["in"] == (staged if to_device else 0)


@needs_ucx
async def test_contiguous_blocks_of_devices_are_few_payloads_and_few_launches() -> None:
    source, target = Pool(True, seed=4), Pool(True)
    async with two_ends("carrying", source, target) as (server, client):
        publication = server.publish(BLOCKS)
        publication.ready(range(BLOCKS))
        publication.finish(7, finished=False)
        await client.pull(publication.handle, range(BLOCKS))
        await publication.released()
    assert np.array_equal(target.memory, source.memory)
    assert source.device.launches == [32, BLOCKS - 32]  # one for each batch, which is one payload
    assert target.device.launches in ([32, BLOCKS - 32], [BLOCKS])


@needs_ucx
@pytest.mark.parametrize("buffers", [1, 4])
async def test_scattered_blocks_of_devices_are_few_payloads_too_whoever_waits_for_the_memory(buffers: int) -> None:
    """Three pulls at a time of ten payloads each, where there is memory for fewer."""
    count, size, draw = 320, 256, random.Random(6)
    source, target = FakeDevicePool(count, size, 4), FakeDevicePool(3 * count, size, buffers)
    source.contents[:] = draw.randbytes(count * size)
    transports = CarryingUcx(), CarryingUcx()
    places = draw.sample(range(3 * count), 3 * count)
    async with (
        BlockServer(DeviceBlocks(source), FINGERPRINT, "p0", 1, transports[:1]) as server,
        PullClient(DeviceBlocks(target), FINGERPRINT, "d0", 2, transports[1:], progress_timeout=30.0) as client,
        asyncio.timeout(20),
    ):
        pulls, expected = [], {}
        for i in range(3):
            publication = server.publish(count)
            sent, received = draw.sample(range(count), count), places[i * count : (i + 1) * count]
            publication.ready(sent)
            publication.finish(7, finished=False)
            pulls.append(client.pull(publication.handle, received))
            expected |= {there: source.block(here) for here, there in zip(sent, received, strict=True)}
        await asyncio.gather(*pulls)
    for transport in transports:
        await transport.close()
    assert all(target.block(there) == data for there, data in expected.items())
    assert source.gathered > 2 * count and target.scattered >= source.gathered
    assert len(target.launches) < count / 4


@needs_ucx
async def test_blocks_arrive_while_others_are_verified_and_those_are_then_verified_together() -> None:
    source, target = Pool(True, seed=5), Pool(True)
    started, go_on, checksums = threading.Event(), threading.Event(), target.device.checksums

    def slow(blocks: Sequence[int], offset: int, length: int) -> list[int]:
        started.set()
        assert go_on.wait(30)
        return checksums(blocks, offset, length)

    target.device.checksums = slow  # type: ignore[method-assign]
    apart = list(range(0, BLOCKS, 2))  # so that each is a payload of its own
    async with two_ends("carrying", source, target) as (server, client), asyncio.timeout(30):
        publication = server.publish(len(apart))
        publication.ready(apart[:1])
        pulling = asyncio.create_task(client.pull(publication.handle, apart))
        await asyncio.to_thread(started.wait, 30)
        for i in range(1, len(apart)):  # announced one after the other
            publication.ready([apart[i]])
            while target.device.block(apart[i]) != source.device.block(apart[i]):
                await asyncio.sleep(0.001)
        assert not pulling.done()
        go_on.set()
        publication.finish(7, finished=False)
        assert (await pulling).first_token == 7
        await publication.released()
    assert target.device.launches == [1, len(apart) - 1]


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
    chunk = CHUNK * max(SIZE, (2 << 20) // SIZE * SIZE)
    assert source.device.host_bytes <= chunk and target.device.host_bytes <= chunk
