"""HTTP/1.1 as uvicorn speaks it, with an end to every head.

The parser collects a request line, headers and trailers for as long as they come, before any application sees the
request: a client could fill the memory with one of them, or hold a connection for ever. Owns these limits; knows
no path.
Invariant: a connection holds at most `MAX_HEAD_BYTES`, and what one read brought, of anything but a body, and a
head that has not ended within `HEAD_SECONDS` ends its connection.
"""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MAX_HEAD_BYTES = 64 * 2**10
HEAD_SECONDS = 10.0  # from the first byte; of a connection's first request, from the start of the connection

_REFUSAL = (
    b"HTTP/1.1 431 Request Header Fields Too Large\r\nConnection: close\r\nContent-Type: application/json\r\n"
    b"Content-Length: %d\r\n\r\n%s"
)
_BODY = b'{"error":{"message":"headers of over %d bytes","type":"invalid_request_error","param":null,"code":null}}'


class BoundedHttpProtocol(HttpToolsProtocol):
    """Breaks off a connection whose head, or whose trailer, goes on and on."""

    head_seconds = HEAD_SECONDS
    _headish = 0  # bytes since the last that were part of a body, or ended a head
    _awaiting: asyncio.TimerHandle | None = None  # runs while a head does

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._end_head()
        super().connection_lost(exc)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._end_head()
        self._await_head()

    def data_received(self, data: bytes) -> None:
        self._headish += len(data)
        super().data_received(data)
        if self._headish > MAX_HEAD_BYTES and not self.transport.is_closing():
            body = _BODY % MAX_HEAD_BYTES
            if self.cycle is None or self.cycle.response_complete:
                self.transport.write(_REFUSAL % (len(body), body))
            self.transport.close()

    def on_headers_complete(self) -> None:
        self._end_head()
        self._headish = 0
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._headish = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._headish = 0
        super().on_message_complete()

    def _await_head(self) -> None:
        self._awaiting = self.loop.call_later(self.head_seconds, self.transport.abort)

    def _end_head(self) -> None:
        if self._awaiting is not None:
            self._awaiting.cancel()
            self._awaiting = None
