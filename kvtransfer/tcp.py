"""The transport over plain sockets: asyncio only, no extra package, one connection a pull.

On the wire: a header of 16 bytes (kind, slot, length), then the frame or payload. Payloads are read from the
socket straight into the posted buffer; nothing is staged. A payload whose receive is not posted yet holds up
everything behind it, and so, through TCP's window, its sender.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import struct
from collections.abc import Callable

from kvtransfer.access import Buffer
from kvtransfer.faults import ConnectionLost, ProtocolError
from kvtransfer.inbox import Inbox
from kvtransfer.transport import MAX_FRAME, Connection, Listener, Transport, split_address

logger = logging.getLogger(__name__)

_HEADER = struct.Struct("<IIQ")
_FRAME, _PAYLOAD = 0, 1
_SOCKET_BUFFER = 1 << 20  # bytes
_BACKLOG = 128


class TcpConnection(Connection):
    """Owns its socket and the task that reads from it."""

    transport = "tcp"
    lanes = "tcp"

    def __init__(self, sock: socket.socket, peer: str) -> None:
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.peer = peer
        self._sock = sock
        self._loop = asyncio.get_running_loop()
        self._inbox = Inbox()
        self._sending = asyncio.Lock()
        self._posted: dict[int, tuple[memoryview, asyncio.Future[None]]] = {}
        self._newly_posted = asyncio.Event()
        self._ended = asyncio.Event()
        self._writers: set[asyncio.Task[None]] = set()
        self._senders: set[asyncio.Task[None]] = set()
        self._reader = asyncio.create_task(self._read())

    async def send_frame(self, frame: bytes) -> None:
        if not 0 < len(frame) <= MAX_FRAME:
            raise ValueError(f"a frame of {len(frame)} bytes")
        await self._send(_HEADER.pack(_FRAME, 0, len(frame)) + frame)

    async def recv_frame(self) -> bytes:
        return await self._inbox.get()

    def send_payload(self, slot: int, data: Buffer) -> asyncio.Future[None]:
        assert isinstance(data, memoryview)
        sent: asyncio.Future[None] = self._loop.create_future()
        sender = asyncio.create_task(self._send(_HEADER.pack(_PAYLOAD, slot, len(data)), data))
        self._senders.add(sender)
        sender.add_done_callback(lambda sender: self._deliver(sender, sent))
        return sent

    def _deliver(self, sender: asyncio.Task[None], sent: asyncio.Future[None]) -> None:
        self._senders.discard(sender)
        error = ConnectionLost("closed") if sender.cancelled() else sender.exception()
        if sent.done():
            return
        if error is None:
            sent.set_result(None)
        else:
            sent.set_exception(error)

    def post_payload(self, slot: int, into: Buffer) -> asyncio.Future[None]:
        assert isinstance(into, memoryview)
        future: asyncio.Future[None] = self._loop.create_future()
        if self._ended.is_set():
            future.set_exception(ConnectionLost("closed"))
        else:
            self._posted[slot] = (into, future)
            self._newly_posted.set()
        return future

    async def close(self) -> None:
        """The order matters: first nobody uses the socket, then it is closed."""
        self._end(ConnectionLost("closed"))
        tasks = [self._reader, *self._writers, *self._senders]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._sock.close()

    async def _send(self, *parts: bytes | memoryview) -> None:
        """Whole or not at all as far as other senders can see: a send that was cut short ends the connection.

        The write runs in a task of the connection, so that ``close()`` can end it before it closes the socket."""
        async with self._sending:
            if self._ended.is_set():
                raise ConnectionLost("closed")
            task = asyncio.create_task(self._write(parts))
            self._writers.add(task)
            try:
                await task
            except asyncio.CancelledError:
                self._end(ConnectionLost("a send was cancelled"))
                if task.cancelled() and not _cancelling():
                    raise ConnectionLost("closed") from None
                raise
            except OSError as error:
                self._end(ConnectionLost(str(error)))
                raise ConnectionLost(str(error)) from error
            finally:
                self._writers.discard(task)

    async def _write(self, parts: tuple[bytes | memoryview, ...]) -> None:
        for part in parts:
            await self._loop.sock_sendall(self._sock, part)

    async def _read(self) -> None:
        header = bytearray(_HEADER.size)
        try:
            while True:
                await self._fill(memoryview(header))
                kind, slot, length = _HEADER.unpack(header)
                if kind == _FRAME:
                    await self._read_frame(length)
                elif kind == _PAYLOAD:
                    await self._read_payload(slot, length)
                else:
                    raise ProtocolError(f"a message of kind {kind}")
        except (ConnectionLost, ProtocolError) as error:
            self._end(error)
        except OSError as error:
            self._end(ConnectionLost(str(error)))

    async def _read_frame(self, length: int) -> None:
        if not 0 < length <= MAX_FRAME:
            raise ProtocolError(f"a frame of {length} bytes")
        frame = bytearray(length)
        await self._fill(memoryview(frame))
        await self._inbox.room()
        self._inbox.put(bytes(frame))

    async def _read_payload(self, slot: int, length: int) -> None:
        while slot not in self._posted:
            self._newly_posted.clear()
            await self._newly_posted.wait()
        into, future = self._posted[slot]
        if len(into) != length:
            raise ProtocolError(f"{length} bytes for a receive of {len(into)}")
        await self._fill(into)
        del self._posted[slot]
        if not future.done():
            future.set_result(None)
        await asyncio.sleep(0)  # a stream that never runs dry must not keep the loop to itself

    async def _fill(self, into: memoryview) -> None:
        while into:
            count = await self._loop.sock_recv_into(self._sock, into)
            if count == 0:
                raise ConnectionLost("the peer closed the connection")
            into = into[count:]

    def _end(self, error: Exception) -> None:
        if self._ended.is_set():
            return
        self._ended.set()
        self._inbox.end(error)
        for _, future in self._posted.values():
            if not future.done():
                future.set_exception(type(error)(*error.args))
        self._posted.clear()


class TcpListener(Listener):
    """Owns the listening socket and the task that accepts."""

    def __init__(self, sock: socket.socket, on_connection: Callable[[Connection], None]) -> None:
        host, port = sock.getsockname()[:2]
        self.address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        self._sock = sock
        self._on_connection = on_connection
        self._acceptor = asyncio.create_task(self._accept())

    async def close(self) -> None:
        self._acceptor.cancel()
        await asyncio.gather(self._acceptor, return_exceptions=True)
        self._sock.close()

    async def _accept(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                sock, address = await loop.sock_accept(self._sock)
            except OSError as error:
                logger.warning("cannot accept on %s: %s", self.address, error)
                await asyncio.sleep(0.1)  # out of file descriptors: the backlog waits
                continue
            self._on_connection(TcpConnection(sock, f"{address[0]}:{address[1]}"))


class TcpTransport(Transport):
    """Sockets of the running event loop, asyncio's or uvloop's."""

    name = "tcp"

    async def listen(self, host: str, on_connection: Callable[[Connection], None]) -> Listener:
        loop = asyncio.get_running_loop()
        family, kind, proto, _, address = (await loop.getaddrinfo(host, 0, type=socket.SOCK_STREAM))[0]
        sock = _new_socket(family, kind, proto)
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(address)
            sock.listen(_BACKLOG)
        except OSError:
            sock.close()
            raise
        return TcpListener(sock, on_connection)

    async def connect(self, address: str) -> Connection:
        loop = asyncio.get_running_loop()
        sock: socket.socket | None = None
        try:
            host, port = split_address(address)
            family, kind, proto, _, where = (await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM))[0]
            sock = _new_socket(family, kind, proto)
            await loop.sock_connect(sock, where)
            return TcpConnection(sock, address)
        except (OSError, ValueError) as error:
            if sock is not None:
                sock.close()
            raise ConnectionLost(str(error)) from error
        except asyncio.CancelledError:
            if sock is not None:
                sock.close()
            raise


def _new_socket(family: int, kind: int, proto: int) -> socket.socket:
    """Buffers are set before the connection, which agrees on the window's scale."""
    sock = socket.socket(family, kind, proto)
    sock.setblocking(False)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _SOCKET_BUFFER)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SOCKET_BUFFER)
    return sock


def _cancelling() -> bool:
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
