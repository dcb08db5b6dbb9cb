"""One UCX endpoint as a connection.

Frames and payloads are tagged messages; a tag is 42 random bits, chosen by the receiver for each connection, and
a slot, so nobody but the peer can hit a posted receive. Knows no listener and no address.
Invariant: a request on the endpoint is waited for before its buffer is let go of.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import struct
from typing import Any

from kvtransfer.access import Buffer
from kvtransfer.faults import ConnectionLost, ProtocolError
from kvtransfer.inbox import Inbox
from kvtransfer.transport import MAX_FRAME, MAX_SLOT, Connection
from kvtransfer.ucx_driver import UcxDriver

logger = logging.getLogger(__name__)

_GREETING = struct.Struct("<8sQ")  # magic, tag base of the greeter's receives
_MAGIC = b"SSKVUCX1"
_FRAME_SLOT = MAX_SLOT + 1  # so that frames and payloads never meet
_SLOT_BITS = 23
_LENGTH = struct.Struct("<I")
CLOSE_NS = 1_000_000_000
_CLOSE_WARNING = 5.0  # seconds


class UcxConnection(Connection):
    """Owns an endpoint and every request on it."""

    transport = "ucx"

    def __init__(self, driver: UcxDriver, endpoint: Any, peer: str) -> None:
        self.peer = peer
        self.lanes = driver.lanes
        self.carries_device_memory = driver.carries_device_memory
        self._driver = driver
        self._endpoint = endpoint
        self._open: dict[asyncio.Future[None], str] = {}  # what runs on the endpoint
        self._receive_base = secrets.randbits(64 - _SLOT_BITS) << _SLOT_BITS
        self._send_base = 0
        self._inbox = Inbox()
        self._ended = False
        self._frame = bytearray(_LENGTH.size + MAX_FRAME)

    async def greet(self) -> None:
        """Exchanges tags over the endpoint's stream, the one thing that is the endpoint's own. ConnectionLost."""
        mine = _GREETING.pack(_MAGIC, self._receive_base)
        theirs = bytearray(_GREETING.size)
        await self._run("stream_send", mine)
        await self._run("stream_recv", theirs)
        magic, base = _GREETING.unpack(theirs)
        if magic != _MAGIC or base & ((1 << _SLOT_BITS) - 1):
            raise ConnectionLost("the peer does not speak this protocol")
        self._send_base = base
        self._post_frame()

    async def send_frame(self, frame: bytes) -> None:
        if not 0 < len(frame) <= MAX_FRAME:
            raise ValueError(f"a frame of {len(frame)} bytes")
        data = _LENGTH.pack(len(frame)) + frame
        await self._run("tag_send", data, self._tag(self._send_base, _FRAME_SLOT))

    async def recv_frame(self) -> bytes:
        return await self._inbox.get()

    def send_payload(self, slot: int, data: Buffer) -> asyncio.Future[None]:
        return self._carry("tag_send", data, self._tag(self._send_base, slot))

    def post_payload(self, slot: int, into: Buffer) -> asyncio.Future[None]:
        return self._carry("tag_recv", into, self._tag(self._receive_base, slot))

    async def close(self) -> None:
        """Waits for every request: UCX has let go of a buffer only when its request has completed. Those of the
        greeting use buffers of their own and are not waited for."""
        self._end(ConnectionLost("closed"))
        if self._endpoint is not None:
            self._endpoint.close_blocking(period=CLOSE_NS, max_attempts=1)
            self._endpoint = None
        while waiting := [future for future, name in self._open.items() if name.startswith("tag")]:
            self._driver.kick()
            _, left = await asyncio.wait(waiting, timeout=_CLOSE_WARNING)
            if left:
                names = ", ".join(self._open.values())
                logger.error("still open after the connection to %s was closed: %s", self.peer, names)

    def _tag(self, base: int, slot: int) -> Any:
        return self._driver.ucx.UCXXTag(base | slot)

    def _start(self, operation: str, buffer: Any, *arguments: Any) -> asyncio.Future[None]:
        if self._ended or not self._endpoint.alive:  # a request on a failed endpoint would never end
            raise ConnectionLost("closed")
        array = self._driver.array(buffer)
        try:
            request = getattr(self._endpoint, operation)(array, *arguments)
        except self._driver.ucx.UCXError as error:
            raise ConnectionLost(str(error)) from error
        future = self._driver.watch(request, array)
        self._open[future] = operation
        future.add_done_callback(self._settle)
        return future

    def _settle(self, request: asyncio.Future[None]) -> None:
        """Whoever started the request may have stopped waiting for it: its error is then nobody's."""
        del self._open[request]
        request.exception()

    async def _run(self, operation: str, buffer: Any, *arguments: Any) -> None:
        future = self._start(operation, buffer, *arguments)
        await asyncio.wait([future])  # unlike await future, being cancelled leaves the request's future alone
        error = future.exception()
        if error is not None:
            raise self._translate(error)

    def _carry(self, operation: str, buffer: Buffer, tag: Any) -> asyncio.Future[None]:
        """A future that its owner may cancel, unlike the request's own."""
        carried: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        try:
            request = self._start(operation, buffer, tag)
        except ConnectionLost as error:
            carried.set_exception(error)
        else:
            request.add_done_callback(lambda request: self._deliver(request, carried))
        return carried

    def _deliver(self, request: asyncio.Future[None], carried: asyncio.Future[None]) -> None:
        error = request.exception()
        if carried.done():
            return
        if error is None:
            carried.set_result(None)
        else:
            carried.set_exception(self._translate(error))

    def _translate(self, error: BaseException) -> Exception:
        if isinstance(error, self._driver.truncated):
            return ProtocolError("a message longer than its receive")
        return ConnectionLost(str(error) or type(error).__name__)

    def _post_frame(self) -> None:
        try:
            request = self._start("tag_recv", self._frame, self._tag(self._receive_base, _FRAME_SLOT))
        except ConnectionLost as error:
            self._take_late_frames()
            self._end(error)
        else:
            request.add_done_callback(self._frame_arrived)

    def _frame_arrived(self, request: asyncio.Future[None]) -> None:
        error = request.exception()
        if error is not None:
            self._take_late_frames()
            self._end(self._translate(error))
        elif self._inbox.full:
            self._end(ProtocolError("the peer sends frames faster than they are read"))
        elif self._take_frame():
            self._post_frame()

    def _take_frame(self) -> bool:
        (length,) = _LENGTH.unpack_from(self._frame)
        if not 0 < length <= MAX_FRAME:
            self._end(ProtocolError(f"a frame of {length} bytes"))
            return False
        self._inbox.put(bytes(self._frame[_LENGTH.size : _LENGTH.size + length]))
        return True

    def _take_late_frames(self) -> None:
        """Frames that UCX holds, received before the endpoint failed: an ERROR from the peer is often one."""
        worker = self._driver.worker
        while worker is not None and not self._inbox.full:
            probe = worker.tag_probe(self._tag(self._receive_base, _FRAME_SLOT), remove=True)
            if not probe.matched or probe.length > len(self._frame):
                return
            array = self._driver.array(self._frame)
            request = worker.tag_recv_with_handle(array, probe)
            if not request.completed:
                future = self._driver.watch(request, array)
                self._open[future] = "tag_recv"
                future.add_done_callback(self._settle)
                return
            if not self._take_frame():
                return

    def _end(self, error: Exception) -> None:
        self._ended = True
        self._inbox.end(error)
