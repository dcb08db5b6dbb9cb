"""Legs whose tokens come by a feed, from a worker behind a real gRPC server."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from typing import Any

import grpc.aio
import pytest

from decode_service.feeds import Feeds
from router.legs import Channels, DecodeLeg, FedDecodeLeg, open_decode
from splitserve.cluster import Role, WorkerInfo
from splitserve.errors import EngineError, Overloaded, Unavailable
from splitserve.grpc_server import GrpcServer
from splitserve.sampling import FinishReason, SamplingParams, TokenOutput
from splitserve.sequences import SequenceRequest
from splitserve.v1 import worker_pb2 as pb
from splitserve.v1 import worker_pb2_grpc
from splitserve.wire import token_to_proto
from tests.router.scripted import SERVICES, MakeWorker

LENGTH = 5


class Worker(worker_pb2_grpc.DecodeServicer):
    """Answers every request with tokens 0 … 4, one behind another."""

    def __init__(self) -> None:
        self.feeds = Feeds()
        self.fed = 0  # requests
        self.feeds_opened = 0
        self.error: Exception | None = None  # raised behind the third token
        self.silent_feed = False
        self.broken = False

    async def Decode(
        self, request: pb.DecodeRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncGenerator[pb.DecodeEvent, None]:
        yield pb.DecodeEvent(accepted=pb.DecodeAccepted())
        feed = self.feeds.find(request.slot.feed)
        self.fed += feed is not None
        for index in range(LENGTH):
            if index == 3 and self.error is not None:
                raise self.error
            await asyncio.sleep(0.001)
            reason = FinishReason.LENGTH if index == LENGTH - 1 else None
            tokens = pb.DecodeTokens(tokens=[token_to_proto(TokenOutput(index, index, finish_reason=reason))])
            if feed is None:
                yield pb.DecodeEvent(tokens=tokens)
            elif not self.silent_feed:
                with feed.used():
                    feed.put(request.slot.number, tokens)

    async def Feed(
        self, request: pb.FeedRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncGenerator[pb.FeedEvent, None]:
        self.feeds_opened += 1
        async with aclosing(self.feeds.events()) as events:
            async for event in events:
                if self.broken:
                    raise Unavailable("the feed is broken")
                yield event


@pytest.fixture
async def worker(monkeypatch: pytest.MonkeyPatch) -> Worker:
    monkeypatch.setattr("decode_service.feeds.UNUSED_SECONDS", 30.0)
    return Worker()


@pytest.fixture
async def info(worker: Worker, make_worker: MakeWorker) -> AsyncIterator[WorkerInfo]:
    register: Callable[..., None] = worker_pb2_grpc.add_DecodeServicer_to_server
    async with (
        asyncio.timeout(60),
        GrpcServer("127.0.0.1", 0, [SERVICES[Role.DECODE]], lambda s: register(worker, s), grace=0) as server,
    ):
        yield make_worker(grpc_address=server.address)


@pytest.fixture
async def channels() -> AsyncIterator[Channels]:
    channels = Channels()
    yield channels
    await channels.close()


def sequence(**params: Any) -> SequenceRequest:
    return SequenceRequest("r", "00" * 32, [1], 1, SamplingParams(max_tokens=LENGTH, seed=0, **params))


async def answer(channels: Channels, info: WorkerInfo, **params: Any) -> tuple[type[DecodeLeg], list[int]]:
    """The kind of the leg, and the token ids to the one that ends the answer."""
    async with open_decode(channels, info, sequence(**params), None, None) as leg:
        ids = []
        async for message in leg.tokens():
            ids += [token.token for token in message.tokens]
            if message.tokens[-1].finish_reason is not None:
                return type(leg), ids
    raise AssertionError("no end")


async def opened(channels: Channels, info: WorkerInfo) -> None:
    """Requests until one is fed."""
    async with asyncio.timeout(20):
        while (await answer(channels, info))[0] is not FedDecodeLeg:
            pass


async def test_a_request_does_not_wait_for_the_feed_to_open(
    channels: Channels, info: WorkerInfo, worker: Worker
) -> None:
    assert await answer(channels, info) == (DecodeLeg, list(range(LENGTH)))
    await opened(channels, info)
    assert worker.fed and worker.feeds_opened == 1


async def test_many_requests_share_it(channels: Channels, info: WorkerInfo, worker: Worker) -> None:
    await opened(channels, info)
    before = worker.fed
    answers = await asyncio.gather(*(answer(channels, info) for _ in range(50)))
    assert answers == [(FedDecodeLeg, list(range(LENGTH)))] * 50
    assert (worker.fed - before, worker.feeds_opened) == (50, 1)


@pytest.mark.parametrize("params", [{"logprobs": 0}, {"prompt_logprobs": 1}])
async def test_long_messages_go_their_own_way(
    channels: Channels, info: WorkerInfo, params: dict[str, int]
) -> None:
    await opened(channels, info)
    assert await answer(channels, info, **params) == (DecodeLeg, list(range(LENGTH)))


@pytest.mark.parametrize("error", [Overloaded("full"), EngineError("broken")])
async def test_how_a_request_failed_is_told_by_its_call(
    channels: Channels, info: WorkerInfo, worker: Worker, error: Exception
) -> None:
    await opened(channels, info)
    worker.error = error
    with pytest.raises(type(error), match=str(error)):
        await answer(channels, info)
    worker.error = None
    assert await answer(channels, info) == (FedDecodeLeg, list(range(LENGTH)))


async def test_a_feed_that_breaks_ends_its_legs_and_is_opened_again(
    channels: Channels, info: WorkerInfo, worker: Worker
) -> None:
    await opened(channels, info)
    worker.broken = True
    with pytest.raises(Unavailable, match="the feed is broken"):
        await answer(channels, info)
    worker.broken = False
    await opened(channels, info)
    assert worker.feeds_opened == 2


async def test_a_feed_that_the_worker_has_ended_costs_no_request(
    channels: Channels, info: WorkerInfo, worker: Worker
) -> None:
    await opened(channels, info)
    worker.feeds = Feeds()  # as if it had ended before the next request came
    assert await answer(channels, info) == (FedDecodeLeg, list(range(LENGTH)))
    assert worker.fed == 1


async def test_tokens_that_never_come_are_not_awaited_for_ever(
    channels: Channels, info: WorkerInfo, worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("router.legs._LATE_SECONDS", 0.05)
    await opened(channels, info)
    worker.silent_feed = True
    with pytest.raises(AssertionError, match="no end"):
        await answer(channels, info)


async def test_a_worker_without_feeds_answers_as_well(
    channels: Channels, info: WorkerInfo, worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def none(*_: object) -> AsyncGenerator[pb.FeedEvent, None]:
        raise Unavailable("no feed here")
        yield

    monkeypatch.setattr(Feeds, "events", none)
    for _ in range(3):
        assert await answer(channels, info) == (DecodeLeg, list(range(LENGTH)))
        await asyncio.sleep(0.02)
