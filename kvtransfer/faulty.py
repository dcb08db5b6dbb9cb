"""A transport that damages what it carries: a public test double around any other transport.

Knows payloads and frames as bytes, not transfers. Everything that the fault leaves alone is carried unchanged.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from kvtransfer.access import Buffer
from kvtransfer.transport import Connection, Listener, Transport

Fault = Callable[[int, memoryview], memoryview | None]
"""Slot and bytes of a payload that is about to be sent -> what is sent instead; ``None`` loses it."""

FrameFault = Callable[[bytes], Sequence[bytes]]
"""A frame that is about to be sent -> the frames that are sent instead, in order; none loses it."""


def _unchanged(slot: int, data: memoryview) -> memoryview:
    return data


def _unchanged_frame(frame: bytes) -> Sequence[bytes]:
    return (frame,)


class FaultyConnection(Connection):
    """Applies the faults to what it sends."""

    def __init__(self, inner: Connection, fault: Fault, frame_fault: FrameFault) -> None:
        self.transport, self.peer, self.lanes = inner.transport, inner.peer, inner.lanes
        self._inner = inner
        self._fault = fault
        self._frame_fault = frame_fault

    async def send_frame(self, frame: bytes) -> None:
        for sent in self._frame_fault(frame):
            await self._inner.send_frame(sent)

    async def recv_frame(self) -> bytes:
        return await self._inner.recv_frame()

    def send_payload(self, slot: int, data: Buffer) -> asyncio.Future[None]:
        assert isinstance(data, memoryview)
        damaged = self._fault(slot, data)
        if damaged is not None:
            return self._inner.send_payload(slot, damaged)
        lost: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        lost.set_result(None)
        return lost

    def post_payload(self, slot: int, into: Buffer) -> asyncio.Future[None]:
        return self._inner.post_payload(slot, into)

    async def close(self) -> None:
        await self._inner.close()


class FaultyTransport(Transport):
    """Wraps ``inner``, which it closes."""

    def __init__(
        self, inner: Transport, fault: Fault = _unchanged, frame_fault: FrameFault = _unchanged_frame
    ) -> None:
        self.name = inner.name
        self._inner = inner
        self._fault = fault
        self._frame_fault = frame_fault

    async def listen(self, host: str, on_connection: Callable[[Connection], None]) -> Listener:
        return await self._inner.listen(host, lambda connection: on_connection(self._wrap(connection)))

    async def connect(self, address: str) -> Connection:
        return self._wrap(await self._inner.connect(address))

    async def close(self) -> None:
        await self._inner.close()

    def _wrap(self, connection: Connection) -> Connection:
        return FaultyConnection(connection, self._fault, self._frame_fault)
