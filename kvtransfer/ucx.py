"""The transport over UCX: shared memory, TCP, RDMA or NVLink, whatever the two ends have in common.

One UCX worker, progressed by the event loop when its file descriptor says so: nothing spins. Frames and payloads
are tagged messages; a tag is 42 random bits, chosen by the receiver for each connection, and a slot, so nobody
but the peer can hit a posted receive.

UCX has no authentication and its listener takes every interface: the secret in the handshake decides who may
pull, and the network should be a private one.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import struct
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

from kvtransfer.faults import ConnectionLost, ProtocolError
from kvtransfer.inbox import Inbox
from kvtransfer.transport import MAX_FRAME, MAX_SLOT, Connection, Listener, Transport, split_address
from splitserve.errors import ConfigError

logger = logging.getLogger(__name__)

_ENVIRONMENT = {
    "UCX_POSIX_ERROR_HANDLING": "y",  # without it shared memory has no error handling and UCX goes over TCP
    "UCXPY_PROGRESS_MODE": "blocking",  # should anyone else in the process use ucxx's own asyncio interface
    "UCX_WARN_UNUSED_ENV_VARS": "n",
    "UCXX_LOG_LEVEL": "fatal",  # a lost peer is an exception, not a line on stderr
}
_GREETING = struct.Struct("<8sQ")  # magic, tag base of the greeter's receives
_MAGIC = b"SSKVUCX1"
_FRAME_SLOT = MAX_SLOT + 1  # so that frames and payloads never meet
_SLOT_BITS = 23
_SAFETY_INTERVAL = 0.1  # seconds: progress at least so often, whatever the file descriptor says
_CLOSE_NS = 1_000_000_000


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
        self.errors: tuple[type[Exception], ...] = (self.ucx.UCXError,)
        self._loop = asyncio.get_running_loop()
        context = self.ucx.UCXContext({})
        self.worker: Any = self.ucx.UCXWorker(
            context, enable_delayed_submission=False, enable_python_future=False
        )
        self.worker.init_blocking_progress_mode()
        self._pending: list[tuple[Any, asyncio.Future[None]]] = []
        self._scheduled: asyncio.Handle | None = None
        self._fd = self.worker.epoll_file_descriptor
        self._loop.add_reader(self._fd, self._drive)
        self._timer = self._loop.call_later(_SAFETY_INTERVAL, self._tick)

    def watch(self, request: Any) -> asyncio.Future[None]:
        """A future that ends when the request has; cancelling it does not cancel the request."""
        future: asyncio.Future[None] = self._loop.create_future()
        self._pending.append((request, future))
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
        for request, future in pending:
            if not request.completed:
                self._pending.append((request, future))
            elif not future.done():
                try:
                    request.check_error()
                except self.errors as error:
                    future.set_exception(error)
                else:
                    future.set_result(None)
        if not self.worker.arm():  # events came meanwhile
            self.kick()
