"""Tokens of many requests as one stream for each caller: one message a step instead of one a request.

Owns the open feeds; knows no engine and no gRPC call. Invariant: what is put into a slot comes out in order, and
a feed ends only while no request uses it, or because its reader has left.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager

from splitserve.errors import Unavailable
from splitserve.v1 import worker_pb2 as pb

UNUSED_SECONDS = 0.25  # until a feed ends: a worker that drains waits for it


class Feed:
    """One caller's stream."""

    def __init__(self) -> None:
        self.number = secrets.randbits(64) or 1
        self._uses = 0
        self._waiting: list[pb.FeedTokens] = []
        self._changed = asyncio.Event()
        self._ended = False

    @contextmanager
    def used(self) -> Iterator[None]:
        """Keeps it open for the length of the block, unless its reader leaves."""
        self._uses += 1
        try:
            yield
        finally:
            self._uses -= 1
            self._changed.set()

    def put(self, slot: int, tokens: pb.DecodeTokens) -> None:
        """Raises Unavailable when nobody reads any more."""
        if self._ended:
            raise Unavailable("the feed that the tokens were meant for has ended")
        self._waiting.append(pb.FeedTokens(slot=slot, tokens=tokens))
        self._changed.set()

    async def events(self) -> AsyncGenerator[pb.FeedEvent, None]:
        """Its number, then what is put, until it has not been used for ``UNUSED_SECONDS``."""
        try:
            yield pb.FeedEvent(feed=self.number)
            while await self._more():
                self._changed.clear()
                if self._waiting:
                    waiting, self._waiting = self._waiting, []
                    yield pb.FeedEvent(tokens=waiting)
        finally:
            self._ended = True

    async def _more(self) -> bool:
        try:
            async with asyncio.timeout(None if self._uses else UNUSED_SECONDS):
                await self._changed.wait()
        except TimeoutError:
            return self._uses > 0
        return True


class Feeds:
    """The feeds of one worker."""

    def __init__(self) -> None:
        self._open: dict[int, Feed] = {}

    def find(self, number: int) -> Feed | None:
        """None for one that has ended, or has never been."""
        return self._open.get(number)

    async def events(self) -> AsyncGenerator[pb.FeedEvent, None]:
        """A new feed, open as long as it is read."""
        feed = Feed()
        self._open[feed.number] = feed
        events = feed.events()
        try:
            async for event in events:
                yield event
        finally:
            del self._open[feed.number]
            await events.aclose()
