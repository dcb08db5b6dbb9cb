"""What a server does with leases, strangers and pullers that come again."""

from __future__ import annotations

import asyncio
import time

import numpy as np
import pytest

from kvtransfer import Connection, Reason, ReleaseReason
from kvtransfer.checksums import Checksum
from kvtransfer.faults import ConnectionLost
from kvtransfer.frames import Error, Frame, Heartbeat, Hello, HelloOk, Pull, Ready, Stamp, decode, encode
from kvtransfer.publication import Publication
from splitserve.errors import TransferFailed
from splitserve.layout import PROTOCOL_VERSION

from .conftest import FINGERPRINT, LAYOUT, MakePair, Pair


async def connect(pair: Pair) -> Connection:
    (address,) = pair.server.addresses.values()
    return await pair.puller_transport.connect(address)


def stamp_of(publication: Publication) -> Stamp:
    return Stamp(publication.handle.transfer_id, publication.handle.epoch, 9)


def hello_of(
    publication: Publication, version: int = PROTOCOL_VERSION, checksums: Checksum = Checksum.CRC32C
) -> Hello:
    handle = publication.handle
    return Hello(version, FINGERPRINT, handle.secret, handle.source, "stranger", 1000, checksums)


async def answer(connection: Connection) -> Frame:
    async with asyncio.timeout(30):
        return decode(await connection.recv_frame())[1]


async def test_a_transfer_that_nobody_pulls_expires(make_pair: MakePair) -> None:
    async with make_pair(lease_seconds=0.2) as pair:
        publication = pair.server.publish(2)
        publication.ready([0, 1])
        publication.finish(1, False)
        start = time.monotonic()
        assert await publication.released() is ReleaseReason.EXPIRED
        assert time.monotonic() - start >= 0.15 and pair.observer.expired == 1
        with pytest.raises(TransferFailed) as caught:
            await pair.client.pull(publication.handle, [0, 1])
        assert caught.value.reason == Reason.EXPIRED


async def test_a_lease_does_not_run_out_while_blocks_are_computed(make_pair: MakePair) -> None:
    async with make_pair(lease_seconds=0.1) as pair:
        publication = pair.server.publish(2)
        publication.ready([0])
        await asyncio.sleep(0.4)
        assert publication.release_reason is None
        publication.ready([1])
        publication.finish(1, False)
        assert await publication.released() is ReleaseReason.EXPIRED


async def test_a_touched_lease_goes_on(make_pair: MakePair) -> None:
    async with make_pair(lease_seconds=1.5) as pair:
        publication = pair.server.publish(1)
        publication.ready([0])
        publication.finish(1, False)
        for _ in range(5):
            await asyncio.sleep(0.4)
            publication.touch()
        assert publication.release_reason is None
        assert await publication.released() is ReleaseReason.EXPIRED


async def test_a_puller_that_falls_silent_loses_the_lease_and_the_connection(make_pair: MakePair) -> None:
    async with make_pair(lease_seconds=0.3) as pair:
        publication = pair.server.publish(4)
        publication.ready(range(4))  # and not finished: the lease does not run out before we come
        connection = await connect(pair)
        into = bytearray(4 * LAYOUT.block_bytes)
        received = [
            connection.post_payload(i, memoryview(into)[i * LAYOUT.block_bytes : (i + 1) * LAYOUT.block_bytes])
            for i in range(4)
        ]
        await connection.send_frame(encode(stamp_of(publication), hello_of(publication)))
        assert isinstance(await answer(connection), HelloOk)
        await connection.send_frame(encode(stamp_of(publication), Pull(0, 0, LAYOUT.block_bytes)))
        await asyncio.gather(*received)
        assert isinstance(await answer(connection), Ready)
        publication.finish(1, False)
        async with asyncio.timeout(30):
            assert await publication.released() is ReleaseReason.EXPIRED
        with pytest.raises(ConnectionLost):
            while True:
                await answer(connection)
        await connection.close()


async def test_a_second_puller_takes_over(make_pair: MakePair) -> None:
    async with make_pair() as pair:
        publication = pair.server.publish(4)
        publication.ready(range(4))
        publication.finish(8, True)
        first = await connect(pair)
        await first.send_frame(encode(stamp_of(publication), hello_of(publication)))
        assert isinstance(await answer(first), HelloOk)
        result = await pair.client.pull(publication.handle, range(4))
        assert result.first_token == 8 and np.array_equal(pair.target[:4], pair.source[:4])
        await first.close()


async def test_a_byte_range_of_the_blocks_can_be_pulled(make_pair: MakePair) -> None:
    offset, length = LAYOUT.head_range(1, 1)
    async with make_pair() as pair:
        publication = pair.server.publish(2)
        publication.ready([6, 7])
        connection = await connect(pair)
        into = np.zeros((2, length), dtype=np.uint8)
        received = [connection.post_payload(i, memoryview(into[i])) for i in range(2)]
        await connection.send_frame(encode(stamp_of(publication), hello_of(publication)))
        await answer(connection)
        await connection.send_frame(encode(stamp_of(publication), Pull(0, offset, length)))
        await asyncio.gather(*received)
        assert np.array_equal(into, pair.source[6:8, offset : offset + length])
        await connection.close()
        publication.fail("enough")


@pytest.mark.parametrize("data", [b"GET / HTTP/1.1\r\n\r\n", b"\0", bytes(8000), b"\xff" * 300])
async def test_garbage_is_answered_with_an_error_and_nothing_more(make_pair: MakePair, data: bytes) -> None:
    async with make_pair() as pair:
        connection = await connect(pair)
        await connection.send_frame(data)
        error = await answer(connection)
        assert isinstance(error, Error) and error.reason is Reason.PROTOCOL
        await connection.close()


async def test_a_stranger_that_says_nothing_is_cut_off(make_pair: MakePair) -> None:
    async with make_pair(hello_seconds=0.1) as pair:
        connection = await connect(pair)
        with pytest.raises(ConnectionLost):
            await answer(connection)
        await connection.close()


async def test_connections_over_the_limit_are_closed(make_pair: MakePair) -> None:
    async with make_pair(max_connections=2) as pair:
        connections = [await connect(pair) for _ in range(3)]
        with pytest.raises(ConnectionLost):
            await answer(connections[2])
        for connection in connections:
            await connection.close()


async def test_another_protocol_version_is_named(make_pair: MakePair) -> None:
    async with make_pair() as pair:
        publication = pair.server.publish(1)
        connection = await connect(pair)
        await connection.send_frame(encode(stamp_of(publication), hello_of(publication, version=99)))
        error = await answer(connection)
        assert isinstance(error, Error) and error.reason is Reason.INCOMPATIBLE and "99" in error.message
        await connection.close()


@pytest.mark.parametrize(
    "frame",
    [Heartbeat(), Pull(5, 0, 16), Pull(0, 0, 0), Pull(0, 16, LAYOUT.block_bytes), Pull(0, 2**63, 2**63)],
)
async def test_a_puller_that_asks_for_what_is_not_there_gets_an_error(make_pair: MakePair, frame: Frame) -> None:
    async with make_pair() as pair:
        publication = pair.server.publish(4)
        connection = await connect(pair)
        await connection.send_frame(encode(stamp_of(publication), hello_of(publication)))
        await answer(connection)
        await connection.send_frame(encode(stamp_of(publication), frame))
        error = await answer(connection)
        assert isinstance(error, Error) and error.reason is Reason.PROTOCOL
        await connection.close()


async def test_a_frame_of_another_transfer_or_epoch_is_refused(make_pair: MakePair) -> None:
    async with make_pair() as pair:
        publication = pair.server.publish(4)
        connection = await connect(pair)
        await connection.send_frame(encode(stamp_of(publication), hello_of(publication)))
        await answer(connection)
        other = Stamp(publication.handle.transfer_id, publication.handle.epoch, 10)
        await connection.send_frame(encode(other, Pull(0, 0, LAYOUT.block_bytes)))
        assert isinstance(await answer(connection), Error)
        await connection.close()
