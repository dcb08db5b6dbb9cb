"""Feeds bring what is put into their slots, and end when nobody uses them."""

from __future__ import annotations

import asyncio

import pytest

from decode_service.feeds import Feed, Feeds
from splitserve.errors import Unavailable
from splitserve.v1 import worker_pb2 as pb
from splitserve.v1.sampling_pb2 import Token


def tokens(index: int) -> pb.DecodeTokens:
    return pb.DecodeTokens(tokens=[Token(index=index)])


async def opened(feeds: Feeds) -> tuple[Feed, asyncio.Queue[pb.FeedEvent | None], asyncio.Task[None]]:
    events: asyncio.Queue[pb.FeedEvent | None] = asyncio.Queue()

    async def read() -> None:
        async for event in feeds.events():
            events.put_nowait(event)
        events.put_nowait(None)

    task = asyncio.create_task(read())
    first = await events.get()
    assert first is not None and not first.tokens
    feed = feeds.find(first.feed)
    assert feed is not None
    return feed, events, task


async def test_what_is_put_together_comes_together_and_in_order() -> None:
    feed, events, _ = await opened(Feeds())
    with feed.used():
        for index in range(3):
            feed.put(7, tokens(index))
            feed.put(8, tokens(index))
        event = await events.get()
        assert event is not None
        assert [(entry.slot, entry.tokens.tokens[0].index) for entry in event.tokens] == [
            (slot, index) for index in range(3) for slot in (7, 8)
        ]
        feed.put(7, tokens(3))
        assert await events.get() == pb.FeedEvent(tokens=[pb.FeedTokens(slot=7, tokens=tokens(3))])


async def test_it_ends_when_it_is_not_used_any_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("decode_service.feeds.UNUSED_SECONDS", 0.05)
    feeds = Feeds()
    feed, events, _ = await opened(feeds)
    with feed.used():
        await asyncio.sleep(0.2)
        assert events.empty() and feeds.find(feed.number) is feed
        feed.put(1, tokens(0))
    assert await events.get() == pb.FeedEvent(tokens=[pb.FeedTokens(slot=1, tokens=tokens(0))])
    async with asyncio.timeout(10):
        assert await events.get() is None
    assert feeds.find(feed.number) is None


async def test_who_puts_into_one_whose_reader_has_left_is_told() -> None:
    feeds = Feeds()
    events = feeds.events()
    feed = feeds.find((await anext(events)).feed)
    assert feed is not None
    await events.aclose()
    assert feeds.find(feed.number) is None
    with pytest.raises(Unavailable), feed.used():
        feed.put(1, tokens(0))


async def test_each_caller_has_a_feed_of_its_own() -> None:
    feeds = Feeds()
    one, _, reading = await opened(feeds)
    other, events, _ = await opened(feeds)
    with one.used(), other.used():
        reading.cancel()
        await asyncio.wait([reading])
        other.put(1, tokens(0))
        assert (await events.get()) is not None
