"""The tokens of many decode legs to one worker, read from one stream.

Owns the call and the task that reads it; knows slots and no requests. Invariant: when a feed breaks, every leg
that has a slot in it hears why. When the worker ends it because nobody uses it, a leg whose call is on its way to
the worker gets its tokens by that call.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Iterator
from contextlib import contextmanager

import grpc.aio

from splitserve.grpc_errors import error_from_rpc
from splitserve.sampling import SamplingParams
from splitserve.v1 import worker_pb2 as pb
from splitserve.v1 import worker_pb2_grpc

log = logging.getLogger(__name__)

Arrival = pb.DecodeTokens | Exception | None  # None: nothing more will come


class Feed:
    """Opens by itself; once it has ended it does not again."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._number: int | None = None  # until the worker has said it
        self._readers: dict[int, asyncio.Queue[Arrival]] = {}  # by slot
        self._slots = itertools.count(1)
        self._call = worker_pb2_grpc.DecodeStub(channel).Feed(pb.FeedRequest())
        self._task = asyncio.create_task(self._read())

    @property
    def ended(self) -> bool:
        return self._task.done()

    @contextmanager
    def slot(self, params: SamplingParams, reader: asyncio.Queue[Arrival]) -> Iterator[pb.FeedSlot | None]:
        """A place for one request, for the length of the block. None while the feed is not open, and for messages
        that may be long: a feed carries those of many requests together."""
        long = params.logprobs is not None or params.prompt_logprobs is not None
        if self._number is None or self.ended or long:
            yield None
            return
        slot = pb.FeedSlot(feed=self._number, number=next(self._slots))
        self._readers[slot.number] = reader
        try:
            yield slot
        finally:
            del self._readers[slot.number]

    def cancel(self) -> None:
        """Whoever has a slot hears nothing more."""
        self._call.cancel()

    async def close(self) -> None:
        self._call.cancel()
        self._task.cancel()
        await asyncio.wait([self._task])

    async def _read(self) -> None:
        try:
            async for event in self._call:
                self._number = event.feed or self._number
                for entry in event.tokens:
                    if (reader := self._readers.get(entry.slot)) is not None:
                        reader.put_nowait(entry.tokens)
        except Exception as problem:
            error = error_from_rpc(problem) if isinstance(problem, grpc.aio.AioRpcError) else problem
            log.info("a feed broke: %s", error)
            for reader in self._readers.values():
                reader.put_nowait(error)
