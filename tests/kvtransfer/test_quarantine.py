"""Blocks that a silent peer might still write or read stay with their transfer until the connection is closed."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import numpy as np
import pytest

from kvtransfer import (
    BlockMemory,
    BlockServer,
    Connection,
    KvHandle,
    Listener,
    MemoryTransport,
    PullClient,
    ReleaseReason,
    Transport,
)
from kvtransfer.checksums import Checksum
from kvtransfer.faults import ConnectionLost
from kvtransfer.frames import Ack, Cancel, Hello, HelloOk, Pull, Ready, Stamp, decode, encode
from kvtransfer.session import slot_of
from splitserve.layout import PROTOCOL_VERSION

from .conftest import BLOCKS, FINGERPRINT, LAYOUT, MakePair

COUNT = 4


async def test_a_puller_gives_its_blocks_back_when_the_silent_source_is_cut_off(
    two_ends: tuple[Transport, Transport],
) -> None:
    """The source announces blocks, sends none, hears the CANCEL and never acknowledges it."""
    accepted: asyncio.Queue[Connection] = asyncio.Queue()
    listener = await two_ends[0].listen("127.0.0.1", accepted.put_nowait)
    handle = KvHandle(
        transfer_id=b"t" * 16, secret=b"s" * 16, addresses={two_ends[0].name: listener.address}, source="p0",
        epoch=3, fingerprint=FINGERPRINT, num_blocks=COUNT,
    )  # fmt: skip
    target = np.zeros((BLOCKS, LAYOUT.block_bytes), dtype=np.uint8)
    async with (
        asyncio.timeout(20),
        PullClient(BlockMemory(target, LAYOUT, BLOCKS), FINGERPRINT, "d0", 5, [two_ends[1]]) as client,
    ):
        pulling = asyncio.create_task(client.pull(handle, range(COUNT)))
        source = await accepted.get()
        stamp, hello = decode(await source.recv_frame())
        assert isinstance(hello, Hello)
        welcome = HelloOk(PROTOCOL_VERSION, FINGERPRINT, 10_000, COUNT, LAYOUT.block_bytes, Checksum.CRC32C)
        await source.send_frame(encode(stamp, welcome))
        assert isinstance(decode(await source.recv_frame())[1], Pull)
        pulling.cancel()
        while not isinstance(decode(await source.recv_frame())[1], Cancel):
            pass
        assert not pulling.done(), "blocks were given back while the source could still write them"
        with pytest.raises(asyncio.CancelledError):
            await pulling
        with pytest.raises(ConnectionLost):
            await source.recv_frame()
        ones = memoryview(np.ones(LAYOUT.block_bytes, dtype=np.uint8))
        late = [source.send_payload(slot_of(i, 0), ones) for i in range(COUNT)]
        await asyncio.wait(late, timeout=0.1)
        assert not target.any(), "late data was accepted"
        await source.close()
        await asyncio.gather(*late, return_exceptions=True)
    await listener.close()


async def test_a_source_gives_its_blocks_back_when_the_puller_that_takes_none_is_cut_off(
    make_pair: MakePair,
) -> None:
    """The puller asks for blocks, receives none of them and cancels: what was offered can still be read."""
    async with asyncio.timeout(20), make_pair() as pair:
        publication = pair.server.publish(COUNT)
        publication.ready(range(COUNT))
        handle = publication.handle
        (address,) = handle.addresses.values()
        puller = await pair.puller_transport.connect(address)
        stamp = Stamp(handle.transfer_id, handle.epoch, 9)
        hello = Hello(
            PROTOCOL_VERSION, FINGERPRINT, handle.secret, handle.source, "stranger", 1000, Checksum.CRC32C
        )
        await puller.send_frame(encode(stamp, hello))
        await puller.send_frame(encode(stamp, Pull(0, 0, LAYOUT.block_bytes)))
        while not isinstance(decode(await puller.recv_frame())[1], Ready):
            pass
        await puller.send_frame(encode(stamp, Cancel(abandon=True)))
        assert await publication.released() is ReleaseReason.CANCELLED
        before = pair.source[:COUNT].copy()
        pair.source[:] = 9  # somebody else's now
        into = np.zeros((COUNT, LAYOUT.block_bytes), dtype=np.uint8)
        received = [puller.post_payload(slot_of(i, 0), memoryview(into[i])) for i in range(COUNT)]
        await asyncio.wait(received, timeout=0.2)
        await puller.close()
        await asyncio.gather(*received, return_exceptions=True)
        assert ((into == before) | (into == 0)).all(), "a block was read behind its back"


class _StuckAtAck(Connection):
    """Carries everything but the ACK, whose sender waits for good."""

    def __init__(self, inner: Connection) -> None:
        self.transport, self.peer = inner.transport, inner.peer
        self._inner = inner

    async def send_frame(self, frame: bytes) -> None:
        if isinstance(decode(frame)[1], Ack):
            await asyncio.Event().wait()
        await self._inner.send_frame(frame)

    async def recv_frame(self) -> bytes:
        return await self._inner.recv_frame()

    def send_payload(self, slot: int, data: memoryview) -> asyncio.Future[None]:
        return self._inner.send_payload(slot, data)

    def post_payload(self, slot: int, into: memoryview) -> asyncio.Future[None]:
        return self._inner.post_payload(slot, into)

    async def close(self) -> None:
        await self._inner.close()


class _StuckTransport(MemoryTransport):
    async def listen(self, host: str, on_connection: Callable[[Connection], None]) -> Listener:
        return await super().listen(host, lambda connection: on_connection(_StuckAtAck(connection)))


async def test_an_ack_that_cannot_be_sent_does_not_hold_the_blocks() -> None:
    source, target = (np.full((COUNT, LAYOUT.block_bytes), value, dtype=np.uint8) for value in (1, 0))
    memory = BlockMemory(target, LAYOUT, COUNT)
    transport = _StuckTransport()
    async with (
        asyncio.timeout(20),
        BlockServer(BlockMemory(source, LAYOUT, COUNT), FINGERPRINT, "p0", 3, [transport]) as server,
        PullClient(memory, FINGERPRINT, "d0", 5, [transport]) as client,
    ):
        publication = server.publish(COUNT)
        publication.ready(range(COUNT))
        publication.finish(1, False)
        await client.pull(publication.handle, range(COUNT))
        assert target.all()
        assert await publication.released() is ReleaseReason.PULLED
