"""The two legs of a request: one stream to a prefill worker, one to a decode worker.

Owns channels and streams; turns messages into plain data and failures into errors of the tree. Knows no policy
and keeps no request. Invariant: leaving a leg's block cancels its call, so that its worker drops the work.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Any, Generic, TypeVar, cast

import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from router.feed import Arrival, Feed
from splitserve.cluster import WorkerInfo
from splitserve.config import TlsFiles
from splitserve.errors import PeerLost, Unavailable
from splitserve.grpc_errors import error_from_rpc
from splitserve.grpc_server import open_channel
from splitserve.model_info import ModelDescription, description_from_proto
from splitserve.sampling import Logprobs, TokenOutput
from splitserve.sequences import SequenceRequest, sequence_to_proto
from splitserve.v1 import worker_pb2 as pb
from splitserve.v1 import worker_pb2_grpc
from splitserve.wire import logprobs_from_proto, token_from_proto

_MODEL_SECONDS = 10.0
_LATE_SECONDS = 5.0  # that tokens in a feed may come behind the end of their call

_Event = TypeVar("_Event", pb.PrefillEvent, pb.DecodeEvent)
Handle = pb.KvHandle  # carried from one leg to the other, never read


@dataclass(frozen=True, slots=True)
class FirstToken:
    """What the prefill leg ends with."""

    token: TokenOutput
    cached_tokens: int


@dataclass(frozen=True, slots=True)
class Tokens:
    """What the decode leg brings. ``cached_tokens`` and ``prompt_logprobs`` mean something the first time."""

    tokens: tuple[TokenOutput, ...]
    cached_tokens: int
    prompt_logprobs: tuple[Logprobs, ...]


class Leg(Generic[_Event]):
    """An open call to a worker."""

    def __init__(self, call: grpc.aio.UnaryStreamCall[Any, _Event]) -> None:
        self._call: grpc.aio.UnaryStreamCall[Any, _Event] = call
        self._lost = False

    def lose(self) -> None:
        """The worker does not answer any more: whoever reads gets PeerLost, and late messages reach nobody."""
        self._lost = True
        self._call.cancel()

    def cancel(self) -> None:
        """The worker drops the work."""
        self._call.cancel()

    async def _read(self) -> _Event | None:
        """The next message, or None at the end of the stream."""
        try:
            message = await self._call.read()
        except grpc.aio.AioRpcError as error:
            raise error_from_rpc(error) from error
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if self._lost and task is not None and not task.cancelling():  # the call was cancelled, we were not
                raise PeerLost("the worker has fallen silent") from None
            raise
        return None if message is grpc.aio.EOF else cast(_Event, message)


class Channels:
    """One channel a worker address, opened at first use, closed when its worker has gone and no leg uses it."""

    def __init__(self, tls: TlsFiles | None = None) -> None:
        self._tls = tls
        self._channels: dict[str, grpc.aio.Channel] = {}
        self._legs: defaultdict[str, set[Leg[Any]]] = defaultdict(set)  # open ones, by address
        self._feeds: dict[str, Feed] = {}  # by address
        self._asked: set[str] = set()  # addresses that `answers` waits for

    def to(self, worker: WorkerInfo) -> grpc.aio.Channel:
        return self._at(worker.grpc_address)

    @contextmanager
    def holding(self, worker: WorkerInfo, leg: Leg[Any]) -> Iterator[None]:
        """Keeps the channel open for the length of the block, which is that of the leg."""
        address = worker.grpc_address
        self._legs[address].add(leg)
        try:
            yield
        finally:
            leg.cancel()
            self._legs[address].discard(leg)
            if not self._legs[address]:
                del self._legs[address]

    def in_use(self) -> list[str]:
        """Addresses that have open legs."""
        return list(self._legs)

    def lose(self, address: str) -> int:
        """Ends all legs to ``address``; how many."""
        legs = list(self._legs.get(address, ()))
        for leg in legs:
            leg.lose()
        if (feed := self._feeds.get(address)) is not None:
            feed.cancel()
        return len(legs)

    async def answers(self, address: str, timeout: float) -> bool:
        """Whether anything comes from ``address``, be it that it is not ready. A refused connection is an answer
        too: a worker that drains takes no new one while its open legs go on, and one that is gone has none."""
        stub = health_pb2_grpc.HealthStub(self._at(address))
        self._asked.add(address)
        try:
            await stub.Check(health_pb2.HealthCheckRequest(), timeout=timeout)
        except grpc.aio.AioRpcError as error:
            return error.code() is not grpc.StatusCode.DEADLINE_EXCEEDED
        finally:
            self._asked.discard(address)
        return True

    async def keep(self, addresses: set[str]) -> None:
        """Closes the channels to all other addresses, but those that a leg still uses."""
        for address in self._channels.keys() - addresses - self._legs.keys() - self._asked:
            await self._close(address)

    async def close(self) -> None:
        while self._channels:
            await self._close(next(iter(self._channels)))

    async def _close(self, address: str) -> None:
        channel = self._channels.pop(address)
        if (feed := self._feeds.pop(address, None)) is not None:
            await feed.close()
        await channel.close()

    def _at(self, address: str) -> grpc.aio.Channel:
        if address not in self._channels:
            self._channels[address] = open_channel(address, self._tls)
        return self._channels[address]

    async def model(self, worker: WorkerInfo) -> ModelDescription:
        """Asks a worker what it serves."""
        stub = worker_pb2_grpc.WorkerStub(self.to(worker))
        try:
            return description_from_proto(await stub.GetModel(pb.GetModelRequest(), timeout=_MODEL_SECONDS))
        except grpc.aio.AioRpcError as error:
            raise error_from_rpc(error) from error

    def feed(self, worker: WorkerInfo) -> Feed:
        """The feed of a decode worker. It opens when it is first asked for, and again when it has ended."""
        address = worker.grpc_address
        feed = self._feeds.get(address)
        if feed is None or feed.ended:
            feed = self._feeds[address] = Feed(self._at(address))
        return feed


class PrefillLeg(Leg[pb.PrefillEvent]):
    """An open Prefill stream: first `handle`, then `first_token`."""

    async def handle(self) -> Handle:
        event = await self._read()
        if event is None or not event.HasField("accepted"):
            raise Unavailable("the prefill worker did not offer its blocks")
        return event.accepted.handle

    async def first_token(self) -> FirstToken:
        event = await self._read()
        if event is None or not event.HasField("done"):
            raise Unavailable("the prefill worker ended without a first token")
        return FirstToken(token_from_proto(event.done.token), event.done.cached_tokens)


class DecodeLeg(Leg[pb.DecodeEvent]):
    """An open Decode stream."""

    async def tokens(self) -> AsyncIterator[Tokens]:
        """Until the worker ends the stream."""
        while (event := await self._read()) is not None:
            if event.HasField("tokens"):
                yield _tokens(event.tokens)


class FedDecodeLeg(DecodeLeg):
    """An open Decode stream whose tokens come by a feed, if that is still there when the worker gets the call."""

    def __init__(
        self, call: grpc.aio.UnaryStreamCall[pb.DecodeRequest, pb.DecodeEvent], arrived: asyncio.Queue[Arrival]
    ) -> None:
        super().__init__(call)
        self._arrived = arrived

    async def tokens(self) -> AsyncIterator[Tokens]:
        """Until the worker has ended the stream, whichever way they came."""
        while (message := await self._arrived.get()) is not None:
            if isinstance(message, Exception):
                raise message
            yield _tokens(message)

    async def follow(self) -> None:
        """Reads the call to its end, which tells how the request ended; the feed may still bring tokens then."""
        try:
            while (event := await self._read()) is not None:
                if event.HasField("tokens"):
                    self._arrived.put_nowait(event.tokens)
        except Exception as error:
            self._arrived.put_nowait(error)
        else:
            await asyncio.sleep(_LATE_SECONDS)
            self._arrived.put_nowait(None)


def _tokens(message: pb.DecodeTokens) -> Tokens:
    return Tokens(
        tuple(token_from_proto(token) for token in message.tokens),
        message.cached_tokens,
        tuple(logprobs_from_proto(entry) for entry in message.prompt_logprobs),
    )


@asynccontextmanager
async def open_prefill(
    channels: Channels, worker: WorkerInfo, sequence: SequenceRequest, timeout: float | None
) -> AsyncIterator[PrefillLeg]:
    """``timeout`` is what is left of the request's time, in seconds."""
    stub = worker_pb2_grpc.PrefillStub(channels.to(worker))
    leg = PrefillLeg(stub.Prefill(pb.PrefillRequest(sequence=sequence_to_proto(sequence)), timeout=timeout))
    with channels.holding(worker, leg):
        yield leg


@asynccontextmanager
async def open_decode(
    channels: Channels, worker: WorkerInfo, sequence: SequenceRequest, handle: Handle | None, timeout: float | None
) -> AsyncIterator[DecodeLeg]:
    """``handle`` says where the blocks come from; None: the worker computes what it has not cached."""
    stub = worker_pb2_grpc.DecodeStub(channels.to(worker))
    arrived: asyncio.Queue[Arrival] = asyncio.Queue()
    with channels.feed(worker).slot(sequence.params, arrived) as slot:
        request = pb.DecodeRequest(sequence=sequence_to_proto(sequence), handle=handle, slot=slot)
        call = stub.Decode(request, timeout=timeout)
        if slot is None:
            leg = DecodeLeg(call)
            with channels.holding(worker, leg):
                yield leg
            return
        fed = FedDecodeLeg(call, arrived)
        with channels.holding(worker, fed):
            following = asyncio.create_task(fed.follow())
            try:
                yield fed
            finally:
                following.cancel()
                await asyncio.wait([following])
