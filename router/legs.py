"""The two legs of a request: one stream to a prefill worker, one to a decode worker.

Owns channels and streams; turns messages into plain data and failures into errors of the tree. Knows no policy
and keeps no request. Invariant: leaving a leg's block cancels its call, so that its worker drops the work.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import grpc.aio

from splitserve.cluster import WorkerInfo
from splitserve.errors import Unavailable
from splitserve.grpc_errors import error_from_rpc
from splitserve.grpc_server import open_channel
from splitserve.model_info import ModelDescription, description_from_proto
from splitserve.sampling import Logprobs, TokenOutput
from splitserve.sequences import SequenceRequest, sequence_to_proto
from splitserve.v1 import worker_pb2 as pb
from splitserve.v1 import worker_pb2_grpc
from splitserve.wire import logprobs_from_proto, token_from_proto

_MODEL_SECONDS = 10.0

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


class Channels:
    """One channel a worker address, opened at first use, closed when its worker has gone and no leg uses it."""

    def __init__(self) -> None:
        self._channels: dict[str, grpc.aio.Channel] = {}
        self._legs: Counter[str] = Counter()  # open ones, by address

    def to(self, worker: WorkerInfo) -> grpc.aio.Channel:
        address = worker.grpc_address
        if address not in self._channels:
            self._channels[address] = open_channel(address)
        return self._channels[address]

    @contextmanager
    def leg(self, worker: WorkerInfo) -> Iterator[grpc.aio.Channel]:
        """The channel, kept open for the length of the block."""
        self._legs[worker.grpc_address] += 1
        try:
            yield self.to(worker)
        finally:
            self._legs[worker.grpc_address] -= 1

    async def keep(self, addresses: set[str]) -> None:
        """Closes the channels to all other addresses, but those that a leg still uses."""
        for address in [a for a in self._channels if a not in addresses and not self._legs[a]]:
            del self._legs[address]
            await self._channels.pop(address).close()

    async def close(self) -> None:
        self._legs.clear()
        await self.keep(set())

    async def model(self, worker: WorkerInfo) -> ModelDescription:
        """Asks a worker what it serves."""
        stub = worker_pb2_grpc.WorkerStub(self.to(worker))
        try:
            return description_from_proto(await stub.GetModel(pb.GetModelRequest(), timeout=_MODEL_SECONDS))
        except grpc.aio.AioRpcError as error:
            raise error_from_rpc(error) from error


class PrefillLeg:
    """An open Prefill stream: first `handle`, then `first_token`."""

    def __init__(self, call: grpc.aio.UnaryStreamCall[pb.PrefillRequest, pb.PrefillEvent]) -> None:
        self._call = call

    async def handle(self) -> Handle:
        event = await _read(self._call)
        if event is None or not event.HasField("accepted"):
            raise Unavailable("the prefill worker did not offer its blocks")
        return event.accepted.handle

    async def first_token(self) -> FirstToken:
        event = await _read(self._call)
        if event is None or not event.HasField("done"):
            raise Unavailable("the prefill worker ended without a first token")
        return FirstToken(token_from_proto(event.done.token), event.done.cached_tokens)


class DecodeLeg:
    """An open Decode stream."""

    def __init__(self, call: grpc.aio.UnaryStreamCall[pb.DecodeRequest, pb.DecodeEvent]) -> None:
        self._call = call

    async def tokens(self) -> AsyncIterator[Tokens]:
        """Until the worker ends the stream."""
        while (event := await _read(self._call)) is not None:
            if event.HasField("tokens"):
                message = event.tokens
                yield Tokens(
                    tuple(token_from_proto(token) for token in message.tokens),
                    message.cached_tokens,
                    tuple(logprobs_from_proto(entry) for entry in message.prompt_logprobs),
                )


@asynccontextmanager
async def open_prefill(
    channels: Channels, worker: WorkerInfo, sequence: SequenceRequest, timeout: float | None
) -> AsyncIterator[PrefillLeg]:
    """``timeout`` is what is left of the request's time, in seconds."""
    with channels.leg(worker) as channel:
        stub = worker_pb2_grpc.PrefillStub(channel)
        call = stub.Prefill(pb.PrefillRequest(sequence=sequence_to_proto(sequence)), timeout=timeout)
        try:
            yield PrefillLeg(call)
        finally:
            call.cancel()


@asynccontextmanager
async def open_decode(
    channels: Channels, worker: WorkerInfo, sequence: SequenceRequest, handle: Handle | None, timeout: float | None
) -> AsyncIterator[DecodeLeg]:
    """``handle`` says where the blocks come from; None: the worker computes what it has not cached."""
    with channels.leg(worker) as channel:
        stub = worker_pb2_grpc.DecodeStub(channel)
        request = pb.DecodeRequest(sequence=sequence_to_proto(sequence), handle=handle)
        call = stub.Decode(request, timeout=timeout)
        try:
            yield DecodeLeg(call)
        finally:
            call.cancel()


async def _read(call: grpc.aio.UnaryStreamCall[Any, _Event]) -> _Event | None:
    """The next message, or None at the end of the stream."""
    try:
        message = await call.read()
    except grpc.aio.AioRpcError as error:
        raise error_from_rpc(error) from error
    return None if message is grpc.aio.EOF else cast(_Event, message)
