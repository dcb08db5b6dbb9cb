"""An event loop whose time is its own, and a network on it that is slow, stalls and breaks.

A wait costs no time: when nothing is ready, the clock goes on to whatever is due next.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import selectors
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from kvtransfer.faults import ConnectionLost
from kvtransfer.transport import Connection, Listener, Transport

T = TypeVar("T")


class _NoWait(selectors.DefaultSelector):
    """Instead of waiting, tells how long it should have waited."""

    def __init__(self) -> None:
        super().__init__()
        self.waited = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        ready = super().select(0)
        if not ready:
            assert timeout is not None, "everybody waits and nothing is due: a deadlock"
            self.waited += max(0.0, timeout)
        return ready


class SimulatedLoop(asyncio.SelectorEventLoop):
    """Begins at time 0."""

    def __init__(self) -> None:
        self._clock = _NoWait()
        super().__init__(self._clock)

    def time(self) -> float:
        return self._clock.waited


def simulate(coroutine: Coroutine[Any, Any, T]) -> T:
    """Runs it to its end in simulated time."""
    with asyncio.Runner(loop_factory=SimulatedLoop) as runner:
        return runner.run(coroutine)


class Weather:
    """What happens to the connections of one network, drawn from ``draw``.

    Each message takes its own time; at ``stalls_at`` all of them stop arriving, at ``breaks_at`` the connections
    of that moment break. ``None``: never."""

    def __init__(self, draw: random.Random, slow: float, stalls_at: float | None, breaks_at: float | None) -> None:
        self._draw = draw
        self._slow = slow
        self._stalls_at = stalls_at
        self.breaks_at = breaks_at

    def delay(self) -> float | None:
        """Seconds until a message that is sent now arrives; ``None``: never."""
        if self._stalls_at is not None and asyncio.get_running_loop().time() >= self._stalls_at:
            return None
        return self._draw.choice([0.0, self._slow, self._draw.uniform(0, 4 * self._slow)])


class WeatheredConnection(Connection):
    """Frames keep their order, payloads don't. What has not arrived when an end closes never does."""

    def __init__(self, inner: Connection, weather: Weather) -> None:
        self.transport, self.peer = inner.transport, inner.peer
        self._inner = inner
        self._weather = weather
        self._closed = asyncio.Event()
        self._frames = asyncio.Lock()
        self._sends: set[asyncio.Task[None]] = set()
        self._lightning = asyncio.create_task(self._strike())

    async def send_frame(self, frame: bytes) -> None:
        async with self._frames:
            await self._travel()
            await self._inner.send_frame(frame)

    async def recv_frame(self) -> bytes:
        return await self._inner.recv_frame()

    def send_payload(self, slot: int, data: memoryview) -> asyncio.Future[None]:
        send = asyncio.create_task(self._carry(slot, data))
        self._sends.add(send)
        send.add_done_callback(self._sends.discard)
        return send

    async def _carry(self, slot: int, data: memoryview) -> None:
        await self._travel()
        await self._inner.send_payload(slot, data)

    def post_payload(self, slot: int, into: memoryview) -> asyncio.Future[None]:
        return self._inner.post_payload(slot, into)

    async def close(self) -> None:
        self._closed.set()
        self._lightning.cancel()
        await asyncio.gather(self._lightning, return_exceptions=True)
        await self._inner.close()
        await asyncio.gather(*self._sends, return_exceptions=True)

    async def _travel(self) -> None:
        delay = self._weather.delay()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(delay):
                await self._closed.wait()
        if self._closed.is_set():
            raise ConnectionLost("closed")

    async def _strike(self) -> None:
        if self._weather.breaks_at is not None:
            left = self._weather.breaks_at - asyncio.get_running_loop().time()
            if left > 0:
                await asyncio.sleep(left)
                self._closed.set()
                await self._inner.close()


class WeatheredTransport(Transport):
    """Wraps ``inner``, which it closes."""

    def __init__(self, inner: Transport, weather: Weather) -> None:
        self.name = inner.name
        self._inner = inner
        self._weather = weather

    async def listen(self, host: str, on_connection: Callable[[Connection], None]) -> Listener:
        return await self._inner.listen(
            host, lambda connection: on_connection(WeatheredConnection(connection, self._weather))
        )

    async def connect(self, address: str) -> Connection:
        return WeatheredConnection(await self._inner.connect(address), self._weather)

    async def close(self) -> None:
        await self._inner.close()
