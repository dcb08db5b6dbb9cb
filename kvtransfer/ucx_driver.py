"""A UCX context and worker, driven by the event loop. Knows requests and no messages.

UCX is progressed when its file descriptor says so, and for a moment behind every event: the next one is often
that near, and waking up costs more than it. A process in which nothing moves does not poll.
Invariant: a future that `watch` returned ends when UCX has let go of the request's buffer.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import sys
import time
from collections.abc import Sequence
from types import ModuleType
from typing import Any

from splitserve.errors import ConfigError

logger = logging.getLogger(__name__)

_ENVIRONMENT = {
    "UCX_POSIX_ERROR_HANDLING": "y",  # without it shared memory has no error handling and UCX goes over TCP
    "UCXPY_PROGRESS_MODE": "blocking",  # should anyone else in the process use ucxx's own asyncio interface
    # At its import UCX patches eight functions of the C library and waits, 50 ms each by itself, for threads to
    # leave them. Ours have nothing to do yet.
    "UCX_MEM_BISTRO_GRACE_DURATION": "1ms",
    "UCX_LOG_LEVEL": "error",  # UCX logs to stdout; a peer that went away is no news
    "UCX_WARN_UNUSED_ENV_VARS": "n",
    "UCXX_LOG_LEVEL": "fatal",  # a lost peer is an exception, not a line on stderr
}
_SAFETY_INTERVAL = 0.1  # seconds: progress at least so often, whatever the file descriptor says
_POLL_SECONDS = 0.0002  # behind an event


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


def resources_of(info: str) -> list[str]:
    """Of a context, as it prints itself: transport and device, as in "tcp/eth0"."""
    return list(dict.fromkeys(re.findall(r"resource \d+ .* flags \S+ (\S+)", info)))


def carries_device_memory(resources: Sequence[str]) -> bool:
    """Whether UCX tells device memory from host memory. Without it a device's address is read as one of the host.
    The context's own `cuda_support` says what UCX_TLS allows, not what was found."""
    return any(resource.startswith("cuda_copy/") for resource in resources)


def device_way(resources: Sequence[str]) -> str:
    """For the log, which can't see the lane of a transfer: how device memory goes."""
    if not carries_device_memory(resources):
        return "is not known to it"
    if any(resource.startswith("cuda_ipc/") for resource in resources):
        return "goes by cuda_ipc between processes of one host"
    return "is carried without cuda_ipc, so slowly on one host"


class UcxDriver:
    """A UCX context and worker, and the futures of the requests under way on it."""

    def __init__(self) -> None:
        self.ucx: Any = load_ucxx()
        import ucxx._lib.arr as arr

        self.array: Any = arr.Array
        self._loop = asyncio.get_running_loop()
        context = self.ucx.UCXContext({})
        self.worker: Any = self.ucx.UCXWorker(context, enable_delayed_submission=False, enable_python_future=False)
        self.worker.init_blocking_progress_mode()
        resources = resources_of(context.info)
        self.lanes = ", ".join(resources)
        self.carries_device_memory = carries_device_memory(resources)
        logger.info(
            "UCX %s can use %s; device memory %s", ".".join(map(str, self.ucx.get_ucx_version())),
            self.lanes or "nothing", device_way(resources),
        )  # fmt: skip
        self.truncated = (self.ucx.UCXMessageTruncatedError, self.ucx.UCXMsgTruncated)
        self._pending: list[tuple[Any, Any, asyncio.Future[None]]] = []
        self._poll_until = 0.0
        self._scheduled: asyncio.Handle | None = None
        self._fd = self.worker.epoll_file_descriptor
        self._loop.add_reader(self._fd, self._drive)
        self._timer = self._loop.call_later(_SAFETY_INTERVAL, self._tick)

    def watch(self, request: Any, buffer: Any) -> asyncio.Future[None]:
        """A future that ends when the request has; ``buffer`` is kept alive as long. Not to be cancelled."""
        future: asyncio.Future[None] = self._loop.create_future()
        if request.completed:
            self._end(request, future)
        else:
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
        now = time.perf_counter()
        if self.worker.progress_once():
            self.worker.progress()
            self._poll_until = now + _POLL_SECONDS
        pending, self._pending = self._pending, []
        for entry in pending:
            request, _, future = entry
            if request.completed:
                self._end(request, future)
            else:
                self._pending.append(entry)
        if now < self._poll_until or not self.worker.arm():  # not armed: events came meanwhile
            self.kick()

    def _end(self, request: Any, future: asyncio.Future[None]) -> None:
        try:
            request.check_error()
        except self.ucx.UCXError as error:
            # Its traceback would keep the request, and so the worker, alive past close().
            future.set_exception(error.with_traceback(None))
        else:
            future.set_result(None)
