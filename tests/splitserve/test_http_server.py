from __future__ import annotations

import asyncio
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from splitserve.http_protocol import BoundedHttpProtocol
from splitserve.http_server import HttpServer

HEAD = b"GET / HTTP/1.1\r\nHost: x\r\n"


class App:
    """A short answer, or one without end until the server says that the client has left."""

    def __init__(self, endless: bool = False) -> None:
        self.endless = endless
        self.sent = 0
        self.ended = asyncio.Event()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        if not self.endless:
            await send({"type": "http.response.body", "body": b"ok"})
            return
        flood = asyncio.create_task(self._flood(send))
        while (await receive())["type"] != "http.disconnect":
            pass
        flood.cancel()
        await asyncio.wait([flood])
        self.ended.set()

    async def _flood(self, send: Any) -> None:
        while True:
            await send({"type": "http.response.body", "body": b"x" * 4096, "more_body": True})
            self.sent += 4096
            await asyncio.sleep(0)


@asynccontextmanager
async def serving(app: App, **options: Any) -> AsyncIterator[HttpServer]:
    async with asyncio.timeout(30), HttpServer(app, "127.0.0.1", 0, grace=1.0, **options) as server:
        yield server


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BoundedHttpProtocol, "head_seconds", 0.2)


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("sent", [b"", b"G", HEAD, HEAD + b"A: b\r\n"])
async def test_a_head_that_does_not_end_ends_its_connection(sent: bytes) -> None:
    async with serving(App()) as server:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(sent)
        with pytest.raises(ConnectionResetError):
            assert await reader.read() == b""
            raise ConnectionResetError  # an end is as good as a reset
        writer.close()


@pytest.mark.usefixtures("impatient")
async def test_a_head_that_comes_byte_by_byte_ends_its_connection() -> None:
    async with serving(App()) as server:
        _, writer = await asyncio.open_connection("127.0.0.1", server.port)
        with pytest.raises(ConnectionError):
            while True:
                writer.write(b"a")
                await writer.drain()
                await asyncio.sleep(0.02)


@pytest.mark.usefixtures("impatient")
async def test_the_second_request_of_a_connection_has_the_same_limit() -> None:
    async with serving(App()) as server:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(HEAD + b"\r\n")
        answer = await reader.readuntil(b"ok")
        assert answer.startswith(b"HTTP/1.1 200")
        await asyncio.sleep(0.3)
        writer.write(HEAD)
        with pytest.raises(ConnectionResetError):
            await reader.read()
            raise ConnectionResetError
        writer.close()


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel watches readers on Linux only")
async def test_a_client_that_does_not_read_is_cut_off() -> None:
    app = App(endless=True)
    async with serving(app, stall_seconds=1.0) as server:
        with socket.create_connection(("127.0.0.1", server.port)) as client:
            client.sendall(HEAD + b"\r\n")
            await app.ended.wait()
    assert app.sent < 20e6


async def test_a_client_that_reads_slowly_is_served() -> None:
    app = App(endless=True)
    async with serving(app, stall_seconds=1.0) as server:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port, limit=2**16)
        writer.write(HEAD + b"\r\n")
        for _ in range(15):
            await reader.readexactly(2**16)
            await asyncio.sleep(0.1)
        assert not app.ended.is_set()
        writer.close()
        await app.ended.wait()
