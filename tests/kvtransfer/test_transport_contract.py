"""What every transport promises, held against each of them."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import numpy as np
import pytest

from kvtransfer import Connection, Transport
from kvtransfer.faults import ConnectionLost, ProtocolError
from kvtransfer.transport import MAX_FRAME, MAX_SLOT

Ends = tuple[Connection, Connection]


@pytest.fixture
async def ends(two_ends: tuple[Transport, Transport]) -> AsyncIterator[Ends]:
    """The connecting and the accepting end."""
    accepted: asyncio.Queue[Connection] = asyncio.Queue()
    listener = await two_ends[0].listen("127.0.0.1", accepted.put_nowait)
    async with asyncio.timeout(30):
        here = await two_ends[1].connect(listener.address)
        there = await accepted.get()
    async with asyncio.timeout(30):
        yield here, there
        await here.close()
        await there.close()
        await listener.close()


def random_bytes(count: int) -> bytes:
    return np.random.default_rng(count).bytes(count)


@pytest.mark.parametrize("size", [1, 2, 40, 1000, MAX_FRAME])
async def test_a_frame_arrives_as_it_was_sent(ends: Ends, size: int) -> None:
    frame = random_bytes(size)
    await ends[0].send_frame(frame)
    assert await ends[1].recv_frame() == frame
    await ends[1].send_frame(frame)
    assert await ends[0].recv_frame() == frame


async def test_frames_arrive_in_order(ends: Ends) -> None:
    frames = [random_bytes(1 + i * 37 % MAX_FRAME) for i in range(100)]
    for frame in frames:
        await ends[0].send_frame(frame)
    assert [await ends[1].recv_frame() for _ in frames] == frames


@pytest.mark.parametrize("size", [0, MAX_FRAME + 1])
async def test_a_frame_of_no_allowed_size_is_refused_by_the_sender(ends: Ends, size: int) -> None:
    with pytest.raises(ValueError, match="frame of"):
        await ends[0].send_frame(bytes(size))


@pytest.mark.parametrize("size", [1, 100, 8191, 8192, 65_537, 368_640, 3 << 20])
@pytest.mark.parametrize("posted_first", [True, False])
async def test_a_payload_goes_into_the_posted_buffer(ends: Ends, size: int, posted_first: bool) -> None:
    data, into = random_bytes(size), bytearray(size + 2)
    view = memoryview(into)[1:-1]
    if posted_first:
        received = ends[1].post_payload(9, view)
        await asyncio.gather(ends[0].send_payload(9, memoryview(data)), received)
    else:
        send = ends[0].send_payload(9, memoryview(data))
        await asyncio.sleep(0.02)
        await asyncio.gather(send, ends[1].post_payload(9, view))
    assert bytes(view) == data and into[0] == into[-1] == 0


async def test_payloads_find_their_slots_whatever_the_order_of_posting(ends: Ends) -> None:
    slots = [5, 1, MAX_SLOT, 0, 7]
    into = {slot: bytearray(50_000) for slot in slots}
    received = [ends[1].post_payload(slot, memoryview(into[slot])) for slot in sorted(slots)]
    data = {slot: random_bytes(50_000 + slot % 10)[:50_000] for slot in slots}
    await asyncio.gather(*received, *(ends[0].send_payload(slot, memoryview(data[slot])) for slot in slots))
    assert {slot: bytes(buffer) for slot, buffer in into.items()} == data


async def test_frames_and_payloads_pass_each_other_in_both_directions(ends: Ends) -> None:
    async def talk(one: Connection, other: Connection, slot: int) -> None:
        data, into = random_bytes(300_000), bytearray(300_000)
        for turn in range(10):
            received = other.post_payload(slot + turn, memoryview(into))
            await one.send_frame(b"next")
            await asyncio.gather(one.send_payload(slot + turn, memoryview(data)), received)
            assert await other.recv_frame() == b"next" and into == data

    await asyncio.gather(talk(ends[0], ends[1], 100), talk(ends[1], ends[0], 200))


async def test_closing_wakes_both_ends(ends: Ends) -> None:
    waiting = [asyncio.create_task(end.recv_frame()) for end in ends]
    posted = [end.post_payload(1, memoryview(bytearray(100))) for end in ends]
    await asyncio.sleep(0.02)
    await ends[0].close()
    results = await asyncio.gather(*waiting, *posted, return_exceptions=True)
    assert [type(result) for result in results] == [ConnectionLost] * 4
    await asyncio.sleep(0.02)
    for end in ends:
        with pytest.raises(ConnectionLost):
            for _ in range(50):  # a peer that is gone shows at the latest when it does not answer
                await end.send_frame(b"x")
                await asyncio.sleep(0.01)


async def test_frames_sent_before_the_end_are_read_before_the_end(ends: Ends) -> None:
    await ends[0].send_frame(b"last words")
    await asyncio.sleep(0.05)
    await ends[0].close()
    await asyncio.sleep(0.05)
    assert await ends[1].recv_frame() == b"last words"
    with pytest.raises(ConnectionLost):
        await ends[1].recv_frame()


async def test_closing_twice_is_closing_once(ends: Ends) -> None:
    await ends[0].close()
    await ends[0].close()
    with pytest.raises(ConnectionLost):
        await ends[0].send_frame(b"x")
    with pytest.raises(ConnectionLost):
        await ends[0].post_payload(1, memoryview(bytearray(10)))


async def test_a_cancelled_read_loses_no_frame(ends: Ends) -> None:
    for turn in range(5):
        read = asyncio.create_task(ends[1].recv_frame())
        await asyncio.sleep(0)
        read.cancel()
        await asyncio.gather(read, return_exceptions=True)
        await ends[0].send_frame(bytes([turn]))
        assert await ends[1].recv_frame() == bytes([turn])


async def test_after_close_no_posted_receive_writes(ends: Ends) -> None:
    size = 2 << 20
    pool = np.zeros((16, size), dtype=np.uint8)
    ones = memoryview(np.ones(size, dtype=np.uint8))
    posted = [ends[1].post_payload(i, memoryview(pool[i])) for i in range(16)]
    sends = [ends[0].send_payload(i, ones) for i in range(16)]
    await posted[0]
    await ends[1].close()
    pool[:] = 7
    await asyncio.gather(*sends, *posted, return_exceptions=True)
    await ends[0].close()
    await asyncio.sleep(0.1)
    assert (pool == 7).all()


async def test_a_cancelled_send_reads_nothing_after_close(ends: Ends) -> None:
    data, into = bytearray(b"a" * (8 << 20)), bytearray(8 << 20)
    send = ends[0].send_payload(1, memoryview(data))
    await asyncio.sleep(0.02)
    send.cancel()
    await asyncio.gather(send, return_exceptions=True)
    await ends[0].close()
    data[:] = b"b" * len(data)
    received = ends[1].post_payload(1, memoryview(into))
    with contextlib.suppress(ConnectionLost, TimeoutError):
        async with asyncio.timeout(0.3):
            await received
    await ends[1].close()
    assert b"b" not in into


async def test_a_payload_longer_than_its_receive_is_an_error_and_stays_inside(ends: Ends) -> None:
    into = bytearray(3000)
    received = ends[1].post_payload(1, memoryview(into)[1000:2000])
    send = ends[0].send_payload(1, memoryview(b"x" * 1500))
    with pytest.raises((ProtocolError, ConnectionLost)):
        await received
    assert into[:1000] == into[2000:] == bytes(1000)
    await ends[0].close()
    await asyncio.gather(send, return_exceptions=True)


async def test_connecting_to_nobody_fails(two_ends: tuple[Transport, Transport]) -> None:
    listener = await two_ends[0].listen("127.0.0.1", lambda connection: None)
    address = listener.address
    await listener.close()
    with pytest.raises((ConnectionLost, TimeoutError)):
        async with asyncio.timeout(30):
            await two_ends[1].connect(address)


@pytest.mark.parametrize("address", ["", "nowhere", "127.0.0.1:", "127.0.0.1:0", "127.0.0.1:99999", "::x"])
async def test_an_address_that_is_none_fails(two_ends: tuple[Transport, Transport], address: str) -> None:
    with pytest.raises(ConnectionLost):
        await two_ends[1].connect(address)
