"""Heads and trailers that never end, over real connections."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from splitserve.http_protocol import MAX_HEAD_BYTES
from splitserve.http_server import HttpServer

ENOUGH = 64 * MAX_HEAD_BYTES


async def app(scope: Any, receive: Any, send: Any) -> None:
    """Answers with the number of bytes in the body."""
    size, more = 0, True
    while more:
        message = await receive()
        size, more = size + len(message.get("body", b"")), message.get("more_body", False)
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"8")]})
    await send({"type": "http.response.body", "body": b"%8d" % size})


@pytest.fixture
async def server() -> AsyncIterator[HttpServer]:
    async with HttpServer(app, "127.0.0.1", 0, grace=1.0) as running:
        yield running


async def flood(server: HttpServer, start: bytes, more: bytes) -> tuple[int, bytes]:
    """Sends ``more`` until the server breaks off: how much it took, and the first line of its answer."""
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    sent, line = 0, b""
    try:
        writer.write(start)
        while sent < ENOUGH:
            writer.write(more)
            await writer.drain()
            sent += len(more)
    except ConnectionError:
        pass
    try:
        async with asyncio.timeout(5):
            line = await reader.readline()
    except ConnectionError:
        pass  # the answer was lost on the way: the server did not wait for what was still coming
    writer.close()
    return sent, line


@pytest.mark.parametrize(
    ("start", "more"),
    [
        (b"GET /", b"x" * 4096),
        (b"GET / HTTP/1.1\r\nHost: x\r\nX-Large: ", b"x" * 4096),
        (b"GET / HTTP/1.1\r\nHost: x\r\n", b"X-Many: 1\r\n" * 400),
        (
            b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n1\r\na\r\n0\r\nX-Trailer: ",
            b"x" * 4096,
        ),
        (b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n1;", b"x" * 4096),
    ],
    ids=["path", "header", "headers", "trailer", "chunk extension"],
)
async def test_what_never_ends_is_broken_off(server: HttpServer, start: bytes, more: bytes) -> None:
    sent, line = await flood(server, start, more)
    assert sent < ENOUGH
    assert line == b"" or b" 431 " in line or b" 400 " in line


async def test_a_large_body_is_no_head(server: HttpServer) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    for size in (10 * MAX_HEAD_BYTES, 3):
        writer.write(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % size + b"a" * size)
        async with asyncio.timeout(10):
            head = await reader.readuntil(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 200") and int(await reader.readexactly(8)) == size
    writer.close()
    await writer.wait_closed()


async def test_many_requests_on_one_connection_do_not_add_up(server: HttpServer) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    request = b"GET / HTTP/1.1\r\nHost: x\r\nX-Large: %s\r\n\r\n" % (b"x" * (MAX_HEAD_BYTES // 3))
    for _ in range(6):
        writer.write(request)
        async with asyncio.timeout(10):
            assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200")
            await reader.readexactly(8)
    writer.close()
    await writer.wait_closed()
