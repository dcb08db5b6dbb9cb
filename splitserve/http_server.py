"""An HTTP server inside a process that has other things to do: uvicorn without its hold on signals.

Owns the socket and the serving task; knows no path. Invariant: after ``close`` the port is free and no task is
left, whatever clients do.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import sys
from collections.abc import Iterator
from types import TracebackType
from typing import Any, Self

import uvicorn

from splitserve.config import TlsFiles
from splitserve.errors import ConfigError
from splitserve.http_protocol import BoundedHttpProtocol
from splitserve.tls import check_files

BACKLOG = 2048
STALL_SECONDS = 30.0
UNSENT_BYTES = 128 * 1024  # that the kernel holds for one client beside what is on its way; else up to 4 MiB


class HttpServer:
    """Serves an ASGI ``app`` on ``host:port`` (0 picks a port) between ``start`` and ``close``.

    Raises ConfigError when the port can't be bound. ``grace``: seconds that open requests get at the end.
    ``tls``: speak HTTPS; a CA in it is not asked for, clients show no certificate. ``stall_seconds``: a client
    that has not taken what was sent to it for so long is cut off (where the system can: Linux).
    """

    def __init__(
        self,
        app: Any,
        host: str,
        port: int,
        grace: float = 5.0,
        tls: TlsFiles | None = None,
        stall_seconds: float = STALL_SECONDS,
        **options: Any,
    ) -> None:
        self._app = app
        self._stall_seconds = stall_seconds
        self._host = host
        self._port = port
        self._grace = grace
        self._tls = tls
        self._options = options
        self._server: _Server | None = None
        self._task: asyncio.Task[None] | None = None

    @property
    def port(self) -> int:
        """The port bound; the one asked for until ``start``."""
        return self._port

    @property
    def url(self) -> str:
        host = f"[{self._host}]" if ":" in self._host else self._host
        return f"{'https' if self._tls else 'http'}://{host}:{self._port}"

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def start(self) -> int:
        """Listens when it returns. Returns the port."""
        assert self._task is None, "already started"
        if self._tls is not None:
            check_files(self._tls)
        listener = bind(self._host, self._port)
        self._port = listener.getsockname()[1]
        if sys.platform == "linux":  # connections inherit it; the kernel watches, so that no event pays for it
            stall = round(self._stall_seconds * 1e3)
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, stall)
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, UNSENT_BYTES)
        config = uvicorn.Config(
            self._app,
            log_config=None,
            access_log=False,
            lifespan="off",
            http=BoundedHttpProtocol,
            ws="none",
            server_header=False,
            timeout_graceful_shutdown=max(1, round(self._grace)),
            ssl_certfile=None if self._tls is None else self._tls.cert,
            ssl_keyfile=None if self._tls is None else self._tls.key,
            **self._options,
        )
        self._server = _Server(config)
        self._task = asyncio.create_task(self._server.serve(sockets=[listener]), name=f"http {self.url}")
        return self._port

    async def wait(self) -> None:
        """Returns when the server has ended; raises what ended it."""
        assert self._task is not None, "not started"
        await asyncio.shield(self._task)

    async def close(self) -> None:
        """Stops listening, gives open requests their grace, cancels the rest."""
        if self._task is None or self._server is None:
            return
        task, self._task = self._task, None
        self._server.should_exit = True
        await task


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """The process decides what signals mean, not one of its servers."""
        yield


def bind(host: str, port: int) -> socket.socket:
    """A listening TCP socket. Raises ConfigError when the address is taken or not ours."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise ConfigError(f"cannot listen on {host}:{port}: {error.strerror}") from error
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(BACKLOG)
        listener.setblocking(False)
    except OSError as error:
        listener.close()
        raise ConfigError(f"cannot listen on {host}:{port}: {error.strerror}") from error
    return listener
