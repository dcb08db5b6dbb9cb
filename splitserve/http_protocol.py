"""HTTP/1.1 as uvicorn speaks it, with an end to every head.

The parser collects a request line, headers and trailers for as long as they come, before any application sees the
request: a client could fill the memory with one of them. Owns that limit; knows no path.
Invariant: a connection holds at most `MAX_HEAD_BYTES`, and what one read brought, of anything but a body.
"""

from __future__ import annotations

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MAX_HEAD_BYTES = 64 * 2**10

_REFUSAL = (
    b"HTTP/1.1 431 Request Header Fields Too Large\r\nConnection: close\r\nContent-Type: application/json\r\n"
    b"Content-Length: %d\r\n\r\n%s"
)
_BODY = b'{"error":{"message":"headers of over %d bytes","type":"invalid_request_error","param":null,"code":null}}'


class BoundedHttpProtocol(HttpToolsProtocol):
    """Breaks off a connection whose head, or whose trailer, goes on and on."""

    _headish = 0  # bytes since the last that were part of a body, or ended a head

    def data_received(self, data: bytes) -> None:
        self._headish += len(data)
        super().data_received(data)
        if self._headish > MAX_HEAD_BYTES and not self.transport.is_closing():
            body = _BODY % MAX_HEAD_BYTES
            if self.cycle is None or self.cycle.response_complete:
                self.transport.write(_REFUSAL % (len(body), body))
            self.transport.close()

    def on_headers_complete(self) -> None:
        self._headish = 0
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._headish = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._headish = 0
        super().on_message_complete()
