"""The decode side: pulls the blocks of prompts that were read elsewhere and continues them, all in one batch.

Owns a reservation until its blocks are filled or given back; knows no routing policy and no prefill worker.
Order, always: reserve here, transfer, then the source frees. Invariant: blocks are given back only when no byte
can arrive in them any more.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing, nullcontext
from dataclasses import replace
from typing import Any

import grpc.aio

from decode_service.feeds import Feeds
from engine import AsyncEngine, EngineOutput, EngineRequest
from kvtransfer import KvHandle, PullClient, Transport
from splitserve.agent import WorkerAgent
from splitserve.cluster import Role, WorkerLoad
from splitserve.directory_records import TransferRecord, TransferState
from splitserve.errors import Incompatible, TransferFailed
from splitserve.layout import KVLayout
from splitserve.logs import request_logger
from splitserve.metrics import EngineMetrics
from splitserve.sequences import SequenceRequest, sequence_from_proto
from splitserve.v1 import worker_pb2 as pb
from splitserve.v1 import worker_pb2_grpc
from splitserve.wire import logprobs_to_proto, token_to_proto
from splitserve.worker import deadline_of, not_joined

log = logging.getLogger(__name__)


class DecodeRole(worker_pb2_grpc.DecodeServicer):
    """The servicer of ``splitserve.v1.Decode`` and its pull client."""

    service = "splitserve.v1.Decode"

    def __init__(
        self,
        engine: AsyncEngine,
        pulls: PullClient,
        transports: Sequence[Transport],
        layout: KVLayout,
        fingerprint: str,
        metrics: EngineMetrics,
    ) -> None:
        self._engine = engine
        self._pulls = pulls
        self._transports = transports
        self._layout = layout
        self._fingerprint = fingerprint
        self._metrics = metrics
        self._feeds = Feeds()
        self._agent: WorkerAgent | None = None  # set once the directory knows this worker

    def register(self, server: grpc.aio.Server) -> None:
        worker_pb2_grpc.add_DecodeServicer_to_server(self, server)

    async def start(self) -> Mapping[str, str]:
        return {}

    def join(self, agent: WorkerAgent) -> None:
        self._pulls.join(agent.info.epoch)
        self._agent = agent

    def complete(self, load: WorkerLoad) -> WorkerLoad:
        return replace(load, transfer_bytes_per_second=self._pulls.bytes_per_second)

    async def close(self) -> None:
        await self._pulls.close()
        for transport in self._transports:
            await transport.close()

    async def Decode(
        self, request: pb.DecodeRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncGenerator[pb.DecodeEvent, None]:
        if self._agent is None:
            raise not_joined(Role.DECODE)
        sequence = sequence_from_proto(request.sequence, self._fingerprint)
        work = EngineRequest(
            sequence.request_id,
            sequence.tokens,
            sequence.params,
            sequence.num_prompt,
            sequence.salt,
            deadline=deadline_of(context),
        )
        yield pb.DecodeEvent(accepted=pb.DecodeAccepted())
        if request.HasField("handle"):
            outputs = self._continue(sequence, work, _handle_from_proto(request.handle))
        else:
            outputs = self._engine.generate(work)
        feed = self._feeds.find(request.slot.feed)
        first = True
        async with aclosing(outputs):
            with nullcontext() if feed is None else feed.used():
                async for output in outputs:
                    if first:
                        self._metrics.observe_queue_time(output.queue_seconds)
                    tokens = _tokens_to_proto(output, first)
                    first = False
                    if feed is None:
                        yield pb.DecodeEvent(tokens=tokens)
                    else:
                        feed.put(request.slot.number, tokens)

    async def Feed(
        self, request: pb.FeedRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncGenerator[pb.FeedEvent, None]:
        async with aclosing(self._feeds.events()) as events:
            async for event in events:
                yield event

    async def _continue(
        self, sequence: SequenceRequest, work: EngineRequest, handle: KvHandle
    ) -> AsyncGenerator[EngineOutput, None]:
        """Pulls what is not cached here, then generates. What arrived before a failure stays cached."""
        logger = request_logger(log, sequence.request_id)
        if handle.num_blocks != self._layout.blocks_for(len(sequence.tokens)):
            raise Incompatible(
                f"a handle of {handle.num_blocks} blocks for a sequence of {len(sequence.tokens)} tokens"
            )
        reservation = await self._engine.reserve(work)
        first = reservation.cached_tokens // self._layout.block_tokens
        arrived = first
        try:

            def on_progress(blocks: int) -> None:
                nonlocal arrived
                arrived = first + blocks

            result = await self._pulls.pull(handle, reservation.blocks[first:], first, on_progress)
        except BaseException as error:
            # the last block may be a partial one
            self._engine.abandon(work.request_id, min(arrived * self._layout.block_tokens, len(sequence.tokens)))
            if isinstance(error, TransferFailed):
                logger.warning("%s", error, extra={"reason": error.reason, "blocks": arrived})
            raise
        logger.info(
            "pulled",
            extra={
                "blocks": result.blocks,
                "bytes": result.bytes,
                "seconds": round(result.seconds, 4),
                "transport": result.transport,
                "cached": reservation.cached_tokens,
                "transfer_id": handle.transfer_id.hex(),
            },
        )
        if self._agent is not None:
            state, here = TransferState.PULLED, self._agent.info.id
            self._agent.record_transfer(TransferRecord(handle.transfer_id, state, destination=here))
        if result.finished:
            self._engine.abandon(work.request_id, len(sequence.tokens))
            return
        outputs = self._engine.generate_loaded(work.request_id, len(sequence.tokens), result.first_token)
        async with aclosing(outputs):
            async for output in outputs:
                yield output


def _tokens_to_proto(output: EngineOutput, first: bool) -> pb.DecodeTokens:
    message = pb.DecodeTokens(tokens=[token_to_proto(token) for token in output.tokens])
    if first:
        message.cached_tokens = output.cached_tokens
        message.queue_seconds = output.queue_seconds
        message.prompt_logprobs.extend(logprobs_to_proto(entry) for entry in output.prompt_logprobs or ())
    return message


def _handle_from_proto(message: pb.KvHandle) -> KvHandle:
    return KvHandle(
        transfer_id=message.transfer_id,
        secret=message.secret,
        addresses=dict(message.addresses),
        source=message.source,
        epoch=message.epoch,
        fingerprint=message.fingerprint,
        num_blocks=message.num_blocks,
    )
