"""A lean HTTP/1.1 client for streamed answers: one connection per request, parsed by httptools.

It shares a machine's few cores with the servers it measures, so it does nothing that a measurement does not
need. Knows lines that begin with ``data:`` and nothing of what they say. Invariant: a line is given the time at
which its bytes reached this process, taken before anything is parsed.
"""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass
from urllib.parse import urlsplit

import httptools

from splitserve.errors import ConfigError

Clock = Callable[[], float]
OnData = Callable[[bytes, float], None]  # the text behind "data:", and when it came

_KEEP_OF_BODY = 4096  # bytes of an answer that is not a stream, for the error message


class RequestFailed(Exception):
    """The server refused, broke off or was too slow; the message says which in a few words."""


@dataclass(frozen=True, slots=True)
class Server:
    """Where requests go."""

    host: str
    port: int
    prefix: str = ""  # of every path
    tls: bool = False

    @classmethod
    def parse(cls, url: str) -> Server:
        """Raises ConfigError."""
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(f"{url!r} is not the URL of an HTTP server")
        tls = parts.scheme == "https"
        return cls(parts.hostname, parts.port or (443 if tls else 80), parts.path.rstrip("/"), tls)


async def post_stream(
    server: Server,
    path: str,
    body: bytes,
    on_data: OnData,
    timeout: float,
    headers: str = "",
    clock: Clock | None = None,
) -> None:
    """Posts JSON and calls ``on_data`` for each line of data until the answer is complete.

    Args:
        timeout: seconds for the whole exchange.
        headers: further header lines, each ended by CRLF.
        clock: of the times; ``time.perf_counter`` by default.

    Raises:
        RequestFailed: no connection, a status other than 200, an answer cut short, or no end within ``timeout``.
    """
    loop = asyncio.get_running_loop()
    head = (
        f"POST {server.prefix}{path} HTTP/1.1\r\nHost: {server.host}:{server.port}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n{headers}Connection: close\r\n\r\n"
    )
    context = ssl.create_default_context() if server.tls else None
    transport: asyncio.Transport | None = None
    try:
        async with asyncio.timeout(timeout):
            transport, stream = await loop.create_connection(
                lambda: _Stream(loop, on_data, clock or time.perf_counter), server.host, server.port, ssl=context
            )
            transport.write(head.encode() + body)
            await stream.complete
    except TimeoutError as error:
        raise RequestFailed(f"no complete answer within {timeout:g} s") from error
    except OSError as error:
        raise RequestFailed(f"connection: {error.strerror or type(error).__name__}") from error
    finally:
        if transport is not None:
            transport.close()
    if stream.status != 200:
        raise RequestFailed(f"status {stream.status}: {stream.rest[:_KEEP_OF_BODY].decode(errors='replace')}")


class _Stream(asyncio.Protocol):
    def __init__(self, loop: asyncio.AbstractEventLoop, on_data: OnData, clock: Clock) -> None:
        self.complete: asyncio.Future[None] = loop.create_future()
        self.status = 0
        self.rest = b""  # an unfinished line, or the body of an answer that is not a stream
        self._on_data = on_data
        self._clock = clock
        self._now = 0.0
        self._parser = httptools.HttpResponseParser(self)

    def data_received(self, data: bytes) -> None:
        self._now = self._clock()
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserCallbackError) as error:
            # what a callback raised is a fault in the reader of the data, and must be seen as it is
            self._fail(error.__context__ or RequestFailed(f"not HTTP: {error}"))

    def connection_lost(self, error: Exception | None) -> None:
        self._fail(RequestFailed("connection closed before the answer was complete"))

    def on_headers_complete(self) -> None:
        self.status = self._parser.get_status_code()

    def on_body(self, part: bytes) -> None:
        if self.rest:
            part = self.rest + part
        if self.status != 200:
            self.rest = part[:_KEEP_OF_BODY]
            return
        *lines, self.rest = part.split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                self._on_data(line[5:].strip(), self._now)

    def on_message_complete(self) -> None:
        if not self.complete.done():
            self.complete.set_result(None)

    def _fail(self, error: BaseException) -> None:
        if not self.complete.done():
            self.complete.set_exception(error)
