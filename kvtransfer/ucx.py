"""The transport over UCX: shared memory, TCP, RDMA or NVLink, whatever the two ends have in common.

One UCX worker, progressed by the event loop when its file descriptor says so: nothing spins. Frames and payloads
are tagged messages; a tag is 42 random bits, chosen by the receiver for each connection, and a slot, so nobody
but the peer can hit a posted receive.

Endpoints use error handling, so UCX takes only lanes that survive the loss of a peer. Those do not write into a
stranger's memory by themselves (as process_vm_writev does), which a closed connection could not stop.

UCX has no authentication, and its listener takes every interface unless the host is loopback: the secret in the
handshake decides who may pull, and the network should be a private one.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import secrets
import struct
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

from kvtransfer.faults import ConnectionLost, ProtocolError
from kvtransfer.inbox import Inbox
from kvtransfer.transport import MAX_FRAME, MAX_SLOT, Connection, Listener, Transport, split_address
from kvtransfer.ucx_loopback import confine
from splitserve.addresses import is_loopback
from splitserve.errors import ConfigError

logger = logging.getLogger(__name__)

_ENVIRONMENT = {
    "UCX_POSIX_ERROR_HANDLING": "y",  # without it shared memory has no error handling and UCX goes over TCP
    "UCXPY_PROGRESS_MODE": "blocking",  # should anyone else in the process use ucxx's own asyncio interface
    "UCX_LOG_LEVEL": "error",  # UCX logs to stdout; a peer that went away is no news
    "UCX_WARN_UNUSED_ENV_VARS": "n",
    "UCXX_LOG_LEVEL": "fatal",  # a lost peer is an exception, not a line on stderr
}
_GREETING = struct.Struct("<8sQ")  # magic, tag base of the greeter's receives
_MAGIC = b"SSKVUCX1"
_FRAME_SLOT = MAX_SLOT + 1  # so that frames and payloads never meet
_SLOT_BITS = 23
_SAFETY_INTERVAL = 0.1  # seconds: progress at least so often, whatever the file descriptor says
_LENGTH = struct.Struct("<I")
_CLOSE_NS = 1_000_000_000
_CLOSE_WARNING = 5.0  # seconds
_GREETING_SECONDS = 2.0
_MAX_GREETERS = 64


def load_ucxx() -> ModuleType:
    """Imports ucxx with the settings that it must find at its import. ConfigError if it is not installed."""
    if "ucxx" not in sys.modules:
        for name, value in _ENVIRONMENT.items():
            os.environ.setdefault(name, value)
    elif os.environ.get("UCX_POSIX_ERROR_HANDLING") != "y":
        logger.warning("ucxx was imported before UCX_POSIX_ERROR_HANDLING=y was set: no shared memory")
    try:
        import ucxx._lib.libucxx as library
    except ImportError as error:
        raise ConfigError(
            f"the ucx transport needs the ucxx package (pip install splitserve[ucx-cu12]): {error}"
        ) from error
    module: ModuleType = library
    return module


class _Driver:
    """A UCX context and worker, and the futures of the requests under way on it."""

    def __init__(self) -> None:
        self.ucx: Any = load_ucxx()
        import ucxx._lib.arr as arr

        self.array: Any = arr.Array
        self._loop = asyncio.get_running_loop()
        context = self.ucx.UCXContext({})
        self.worker: Any = self.ucx.UCXWorker(context, enable_delayed_submission=False, enable_python_future=False)
        self.worker.init_blocking_progress_mode()
        self.lanes = ", ".join(dict.fromkeys(re.findall(r"flags -- (\S+)", context.info)))
        self.truncated = (self.ucx.UCXMessageTruncatedError, self.ucx.UCXMsgTruncated)
        self._pending: list[tuple[Any, Any, asyncio.Future[None]]] = []
        self._scheduled: asyncio.Handle | None = None
        self._fd = self.worker.epoll_file_descriptor
        self._loop.add_reader(self._fd, self._drive)
        self._timer = self._loop.call_later(_SAFETY_INTERVAL, self._tick)

    def watch(self, request: Any, buffer: Any) -> asyncio.Future[None]:
        """A future that ends when the request has; ``buffer`` is kept alive as long. Not to be cancelled."""
        future: asyncio.Future[None] = self._loop.create_future()
        self._pending.append((request, buffer, future))
        self.kick()
        return future

    def kick(self) -> None:
        """Progress before the loop sleeps: a new request may have raised no event."""
        if self._scheduled is None:
            self._scheduled = self._loop.call_soon(self._drive)

    def close(self) -> None:
        self._loop.remove_reader(self._fd)
        self._timer.cancel()
        if self._scheduled is not None:
            self._scheduled.cancel()
        self.worker = None

    def _tick(self) -> None:
        self._timer = self._loop.call_later(_SAFETY_INTERVAL, self._tick)
        self._drive()

    def _drive(self) -> None:
        if self._scheduled is not None:
            self._scheduled.cancel()
            self._scheduled = None
        self.worker.progress()
        pending, self._pending = self._pending, []
        for entry in pending:
            request, _, future = entry
            if not request.completed:
                self._pending.append(entry)
                continue
            try:
                request.check_error()
            except self.ucx.UCXError as error:
                # Its traceback would keep the request, and so the worker, alive past close().
                future.set_exception(error.with_traceback(None))
            else:
                future.set_result(None)
        if not self.worker.arm():  # events came meanwhile
            self.kick()


class UcxConnection(Connection):
    """Owns an endpoint and every request on it."""

    transport = "ucx"

    def __init__(self, driver: _Driver, endpoint: Any, peer: str) -> None:
        self.peer = peer
        self.lanes = driver.lanes
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

    async def send_payload(self, slot: int, data: memoryview) -> None:
        await self._run("tag_send", data, self._tag(self._send_base, slot))

    def post_payload(self, slot: int, into: memoryview) -> asyncio.Future[None]:
        received: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        try:
            request = self._start("tag_recv", into, self._tag(self._receive_base, slot))
        except ConnectionLost as error:
            received.set_exception(error)
        else:
            request.add_done_callback(lambda request: self._deliver(request, received))
        return received

    async def close(self) -> None:
        """Waits for every request: UCX has let go of a buffer only when its request has completed. Those of the
        greeting use buffers of their own and are not waited for."""
        self._end(ConnectionLost("closed"))
        if self._endpoint is not None:
            self._endpoint.close_blocking(period=_CLOSE_NS, max_attempts=1)
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

    def _deliver(self, request: asyncio.Future[None], received: asyncio.Future[None]) -> None:
        error = request.exception()
        if received.done():
            return
        if error is None:
            received.set_result(None)
        else:
            received.set_exception(self._translate(error))

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


class UcxListener(Listener):
    """Owns the UCX listener and the tasks that greet newcomers."""

    def __init__(self, driver: _Driver, host: str, on_connection: Callable[[Connection], None]) -> None:
        self._driver = driver
        self._on_connection = on_connection
        self._greeters: set[asyncio.Task[None]] = set()
        self._listener: Any = driver.ucx.UCXListener.create(
            worker=driver.worker, port=0, cb_func=self._accept, cb_args=(), deliver_endpoint=True
        )
        if is_loopback(host):
            confine(self._listener.port)
        self.address = f"[{host}]:{self._listener.port}" if ":" in host else f"{host}:{self._listener.port}"

    async def close(self) -> None:
        self._listener = None
        for task in list(self._greeters):
            task.cancel()
        await asyncio.gather(*self._greeters, return_exceptions=True)

    def _accept(self, endpoint: Any, *_: object) -> None:
        """Called by UCX while the driver makes progress, in the loop's thread."""
        if self._listener is None or len(self._greeters) >= _MAX_GREETERS:
            endpoint.close_blocking(period=_CLOSE_NS, max_attempts=1)
            return
        connection = UcxConnection(self._driver, endpoint, f"{endpoint.handle:#x}")
        task = asyncio.get_running_loop().create_task(self._greet(connection))
        self._greeters.add(task)
        task.add_done_callback(self._greeters.discard)

    async def _greet(self, connection: UcxConnection) -> None:
        try:
            async with asyncio.timeout(_GREETING_SECONDS):
                await connection.greet()
        except (ConnectionLost, TimeoutError) as error:
            logger.info("a newcomer went away before it said anything: %s", error or "too slow")
            await connection.close()
        except asyncio.CancelledError:
            await connection.close()
            raise
        else:
            self._on_connection(connection)


class UcxTransport(Transport):
    """Makes its UCX worker at the first use, for the event loop that runs then."""

    name = "ucx"

    def __init__(self) -> None:
        """ConfigError if ucxx is not installed."""
        load_ucxx()
        self._driver: _Driver | None = None

    async def listen(self, host: str, on_connection: Callable[[Connection], None]) -> Listener:
        try:
            listener = UcxListener(self._running(), host, on_connection)
        except load_ucxx().UCXError as error:
            raise OSError(f"UCX cannot listen: {error}") from error
        if not is_loopback(host):
            port = listener.address.rpartition(":")[2]
            logger.info("UCX listens on every interface, port %s; the handshake's secret guards it", port)
        return listener

    async def connect(self, address: str) -> Connection:
        driver = self._running()
        try:
            host, port = split_address(address)
            loop = asyncio.get_running_loop()
            where = (await loop.getaddrinfo(host, port))[0][4][0]
            endpoint = driver.ucx.UCXEndpoint.create(driver.worker, str(where), port, True)
        except (ValueError, OSError, driver.ucx.UCXError) as error:
            raise ConnectionLost(str(error)) from error
        connection = UcxConnection(driver, endpoint, address)
        try:
            await connection.greet()
        except BaseException:
            await connection.close()
            raise
        return connection

    async def close(self) -> None:
        if self._driver is not None:
            self._driver.close()
            self._driver = None

    def _running(self) -> _Driver:
        if self._driver is None:
            self._driver = _Driver()
        return self._driver
