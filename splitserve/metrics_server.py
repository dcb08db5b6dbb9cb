"""The HTTP port of a worker: ``/metrics`` for Prometheus, ``/live`` and ``/ready`` for whoever restarts it.

Owns no metric and no state: asks for both at each request. Invariant: nothing but these three paths, read only;
where keys are set, a status alone without one.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from types import TracebackType
from typing import Any, Self

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

from splitserve.api_keys import Keyring
from splitserve.config import TlsFiles
from splitserve.errors import Unauthenticated
from splitserve.http_server import HttpServer

TEXT = "text/plain; charset=utf-8"


class MetricsServer:
    """Serves ``registry`` on ``host:port`` (0 picks a port). ``not_ready`` says why not, in words; empty: ready.
    ``not_live``: why the process should be restarted.

    Raises ConfigError when the port can't be bound.
    """

    def __init__(
        self,
        registry: CollectorRegistry,
        not_ready: Callable[[], Sequence[str]],
        host: str = "127.0.0.1",
        port: int = 0,
        not_live: Callable[[], Sequence[str]] = tuple,
        keyring: Keyring | None = None,
        tls: TlsFiles | None = None,
    ) -> None:
        self._keyring = keyring or Keyring()
        self._registry = registry
        self._not_ready = not_ready
        self._not_live = not_live
        self._server = HttpServer(self._app, host, port, grace=1.0, tls=tls, interface="asgi3")

    @property
    def port(self) -> int:
        return self._server.port

    @property
    def url(self) -> str:
        return self._server.url

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def start(self) -> int:
        """Listens when it returns. Returns the port."""
        return await self._server.start()

    async def close(self) -> None:
        await self._server.close()

    async def _app(
        self,
        scope: dict[str, Any],
        receive: Callable[[], Awaitable[dict[str, Any]]],
        send: Callable[[dict[str, Any]], Awaitable[None]],
    ) -> None:
        if scope["type"] != "http":
            return
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        status, content_type, body = self._answer(scope["method"], scope["path"], headers.get(b"authorization"))
        said = [(b"content-type", content_type.encode()), (b"content-length", str(len(body)).encode())]
        if status == 401:
            said.append((b"www-authenticate", b"Bearer"))
        await send({"type": "http.response.start", "status": status, "headers": said})
        await send({"type": "http.response.body", "body": b"" if scope["method"] == "HEAD" else body})

    def _answer(self, method: str, path: str, authorization: str | None) -> tuple[int, str, bytes]:
        try:
            self._keyring.tenant(authorization)
            known = True
        except Unauthenticated as error:
            if path not in ("/live", "/ready"):
                return 401, TEXT, f"{error.message}\n".encode()
            known = False
        if path not in ("/metrics", "/live", "/ready"):
            return 404, TEXT, b"not found\n"
        if method not in ("GET", "HEAD"):
            return 405, TEXT, b"method not allowed\n"
        if path == "/metrics":
            return 200, CONTENT_TYPE_LATEST, generate_latest(self._registry)
        reasons = self._not_ready() if path == "/ready" else self._not_live()
        if reasons:
            told = reasons if known else ("not " + path[1:],)
            return 503, TEXT, "".join(f"{reason}\n" for reason in told).encode()
        return 200, TEXT, b"ok\n"
