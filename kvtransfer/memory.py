"""The transport inside one process: a public test double for the real ones.

Give the same object to the server and to the puller. Knows no socket; keeps every promise of the interface.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable

from kvtransfer.access import Buffer
from kvtransfer.faults import ConnectionLost, ProtocolError
from kvtransfer.inbox import Inbox
from kvtransfer.transport import MAX_FRAME, Connection, Listener, Transport


class MemoryConnection(Connection):
    """One of two ends that know each other."""

    transport = "memory"
    lanes = "memcpy"

    def __init__(self, peer: str) -> None:
        self.peer = peer
        self._other: MemoryConnection | None = None
        self._inbox = Inbox()
        self._posted: dict[int, tuple[memoryview, asyncio.Future[None]]] = {}
        self._offered: dict[int, tuple[memoryview, asyncio.Future[None]]] = {}  # by the other end
        self._closed = False

    @classmethod
    def pair(cls, address: str) -> tuple[MemoryConnection, MemoryConnection]:
        one, two = cls(address), cls("memory")
        one._other, two._other = two, one
        return one, two

    async def send_frame(self, frame: bytes) -> None:
        if not 0 < len(frame) <= MAX_FRAME:
            raise ValueError(f"a frame of {len(frame)} bytes")
        other = self._peer_end()
        await other._inbox.room()
        self._peer_end()._inbox.put(bytes(frame))

    async def recv_frame(self) -> bytes:
        return await self._inbox.get()

    def send_payload(self, slot: int, data: Buffer) -> asyncio.Future[None]:
        assert isinstance(data, memoryview)
        sent: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        if self._closed or self._other is None:
            sent.set_exception(ConnectionLost("closed"))
        else:
            self._other._offered[slot] = (data, sent)
            self._other._match(slot)
        return sent

    def post_payload(self, slot: int, into: Buffer) -> asyncio.Future[None]:
        assert isinstance(into, memoryview)
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        if self._closed:
            future.set_exception(ConnectionLost("closed"))
        else:
            self._posted[slot] = (into, future)
            self._match(slot)
        return future

    async def close(self) -> None:
        for end in (self, self._other):
            if end is not None and not end._closed:
                end._shut()

    def _peer_end(self) -> MemoryConnection:
        if self._closed or self._other is None:
            raise ConnectionLost("closed")
        return self._other

    def _match(self, slot: int) -> None:
        if slot not in self._posted or slot not in self._offered:
            return
        (into, received), (data, sent) = self._posted.pop(slot), self._offered.pop(slot)
        if not sent.done():
            sent.set_result(None)
        if len(data) != len(into):
            if not received.done():
                received.set_exception(ProtocolError(f"{len(data)} bytes for a receive of {len(into)}"))
            return
        into[:] = data
        if not received.done():
            received.set_result(None)

    def _shut(self) -> None:
        self._closed = True
        lost = ConnectionLost("closed")
        self._inbox.end(lost)
        for _, future in [*self._posted.values(), *self._offered.values()]:
            if not future.done():
                future.set_exception(ConnectionLost("closed"))
        self._posted.clear()
        self._offered.clear()


class MemoryListener(Listener):
    """An address in a :class:`MemoryTransport`."""

    def __init__(self, address: str, on_close: Callable[[str], object]) -> None:
        self.address = address
        self._on_close = on_close

    async def close(self) -> None:
        self._on_close(self.address)


class MemoryTransport(Transport):
    """A network of its own: connects only to listeners of the same object."""

    name = "memory"

    def __init__(self) -> None:
        self._ports = itertools.count(1)
        self._listeners: dict[str, Callable[[Connection], None]] = {}

    async def listen(self, host: str, on_connection: Callable[[Connection], None]) -> Listener:
        address = f"{host}:{next(self._ports)}"
        self._listeners[address] = on_connection
        return MemoryListener(address, lambda address: self._listeners.pop(address, None))

    async def connect(self, address: str) -> Connection:
        accept = self._listeners.get(address)
        if accept is None:
            raise ConnectionLost(f"nobody listens on {address}")
        here, there = MemoryConnection.pair(address)
        accept(there)
        return here
