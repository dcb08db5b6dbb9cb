"""Answers whose work ends when their reader leaves: plain ones and streams of server-sent events.

Owns the race between work and disconnect, and the framing of events; knows not what the events say.
Invariant: the work is cancelled and awaited before the response returns, whichever side ends it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine
from contextlib import aclosing, asynccontextmanager
from typing import Any, TypeVar

import orjson
from fastapi import Response
from starlette.types import Receive, Scope, Send

from router.http.errors import ClientGone, body_of, error_body
from splitserve.errors import DeadlineExceeded, SplitServeError

log = logging.getLogger(__name__)

T = TypeVar("T")

DONE = b"data: [DONE]\n\n"
_LAST_SECONDS = 10.0  # for a client that does not read; its work has ended by then


def event(data: Any) -> bytes:
    """One event that carries JSON."""
    return b"data: " + orjson.dumps(data) + b"\n\n"


@asynccontextmanager
async def within(deadline: float) -> AsyncIterator[None]:
    """Raises ``DeadlineExceeded`` inside once ``deadline`` (loop time) has passed."""
    try:
        async with asyncio.timeout_at(deadline):
            yield
    except TimeoutError as error:
        raise DeadlineExceeded("the request's time is over") from error


async def until_disconnect(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of ``work``; raises ``ClientGone`` and cancels it if the client leaves first."""
    task = asyncio.create_task(work)
    watcher = asyncio.create_task(_disconnected(receive))
    try:
        await asyncio.wait((task, watcher), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        return task.result()
    finally:
        task.cancel()
        watcher.cancel()
        await asyncio.gather(task, watcher, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """Sends what ``events`` yields. The status is sent with the first of it: an error before is a plain answer.

    An error after that is an event of its own, followed by ``[DONE]``.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes, None], deadline: float) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._events = events
        self._deadline = deadline

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await until_disconnect(receive, self._send(send))
        except ClientGone:
            log.info("the client left before its stream ended")

    async def _send(self, send: Send) -> None:
        async with aclosing(self._events) as events:
            async with within(self._deadline):
                part = await anext(events)
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            last = b""
            try:
                async with within(self._deadline):
                    await _body(send, part)
                    async for part in events:
                        await _body(send, part)
            except SplitServeError as error:
                log.warning("stream ended with an error: %s", error.message)
                last = b"data: " + body_of(error) + b"\n\n" + DONE
            except Exception:
                log.exception("bug in the middle of a stream")
                last = b"data: " + error_body("Internal server error", "internal_error") + b"\n\n" + DONE
        try:
            async with asyncio.timeout(_LAST_SECONDS):
                await _body(send, last, more=False)
        except TimeoutError as error:
            raise ClientGone from error


async def _body(send: Send, data: bytes, more: bool = True) -> None:
    await send({"type": "http.response.body", "body": data, "more_body": more})
