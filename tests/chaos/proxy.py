"""A TCP link that fails on demand: slow, thin, silent, cut or noisy.

Owns a listener and what passes through it; knows no protocol. Invariant: with nothing set, bytes pass unchanged.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from types import TracebackType
from typing import Self

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]
_CHUNK = 16 * 1024


class FaultProxy:
    """``async with FaultProxy(connect) as proxy``: what connects to ``proxy.address`` reaches ``connect()``.

    The faults are plain attributes and act on connections that are open, too. The counters prove that they did.
    """

    def __init__(self, connect: Callable[[], Awaitable[Streams]], host: str = "127.0.0.1") -> None:
        self._connect = connect
        self._host = host
        self.delay = 0.0  # seconds, each way
        self.rate: float | None = None  # bytes a second, of all connections and both ways together
        self.refusing = False  # new connections are closed at once
        self.flips = 0  # so many of the next chunks get one bit changed
        self.passing = asyncio.Event()  # cleared: connected, but silent
        self.passing.set()
        self.bytes_passed = 0
        self.chunks_delayed = 0
        self.bits_flipped = 0
        self.connections_cut = 0
        self._free_at = 0.0  # loop time at which the bytes accepted so far are through
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None

    @property
    def address(self) -> str:
        assert self._server is not None
        host, port = self._server.sockets[0].getsockname()[:2]
        return f"{host}:{port}"

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._accept, self._host, 0)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._server is not None
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self.cut()
        await asyncio.sleep(0)

    def cut(self) -> None:
        """Breaks every open connection off."""
        for writer in list(self._writers):
            self.connections_cut += 1
            writer.transport.abort()

    def heal(self) -> None:
        self.delay, self.rate, self.refusing, self.flips = 0.0, None, False, 0
        self.passing.set()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self.refusing:
            self.connections_cut += 1
            writer.transport.abort()
            return
        try:
            far_reader, far_writer = await self._connect()
        except OSError:
            writer.transport.abort()
            return
        self._writers |= {writer, far_writer}
        pumps = [
            asyncio.create_task(self._pump(reader, far_writer)),
            asyncio.create_task(self._pump(far_reader, writer)),
        ]
        self._tasks |= set(pumps)
        for pump in pumps:
            pump.add_done_callback(self._tasks.discard)
        await asyncio.wait(pumps)
        self._writers -= {writer, far_writer}
        for each in (writer, far_writer):
            each.close()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while chunk := await reader.read(_CHUNK):
                await self.passing.wait()
                if self.delay:
                    self.chunks_delayed += 1
                    await asyncio.sleep(self.delay)
                if self.rate:
                    now = asyncio.get_running_loop().time()
                    self._free_at = max(now, self._free_at) + len(chunk) / self.rate
                    self.chunks_delayed += 1
                    await asyncio.sleep(self._free_at - now)
                if self.flips:
                    self.flips -= 1
                    self.bits_flipped += 1
                    middle = len(chunk) // 2
                    chunk = chunk[:middle] + bytes([chunk[middle] ^ 1]) + chunk[middle + 1 :]
                writer.write(chunk)
                await writer.drain()
                self.bytes_passed += len(chunk)
        with contextlib.suppress(OSError):
            writer.close()
