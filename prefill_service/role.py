"""The prefill side: reads prompts and offers their KV blocks while they are being computed.

Owns a publication from its first block to its release; knows no routing policy and no decode worker.
Invariant: blocks are freed only after their publication was released, when nobody can read them any more.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing, suppress
from typing import Any

import grpc.aio

from engine import AsyncEngine, EngineOutput, EngineRequest
from kvtransfer import BlockServer, KvHandle, Publication, Transport
from splitserve.agent import WorkerAgent
from splitserve.cluster import Role, WorkerLoad
from splitserve.directory_records import TransferRecord, TransferState
from splitserve.layout import KVLayout
from splitserve.logs import ContextLogger, request_logger
from splitserve.metrics import EngineMetrics
from splitserve.sequences import SequenceRequest, sequence_from_proto
from splitserve.v1 import worker_pb2 as pb
from splitserve.v1 import worker_pb2_grpc
from splitserve.wire import token_to_proto
from splitserve.worker import deadline_of, not_joined

log = logging.getLogger(__name__)

_TOUCH_SECONDS = 1.0


class PrefillRole(worker_pb2_grpc.PrefillServicer):
    """The servicer of ``splitserve.v1.Prefill`` and its block server."""

    service = "splitserve.v1.Prefill"

    def __init__(
        self,
        engine: AsyncEngine,
        blocks: BlockServer,
        transports: Sequence[Transport],
        layout: KVLayout,
        fingerprint: str,
        metrics: EngineMetrics,
    ) -> None:
        self._engine = engine
        self._blocks = blocks
        self._transports = transports
        self._layout = layout
        self._fingerprint = fingerprint
        self._metrics = metrics
        self._agent: WorkerAgent | None = None  # set once the directory knows this worker
        self._releases: set[asyncio.Task[None]] = set()

    def register(self, server: grpc.aio.Server) -> None:
        worker_pb2_grpc.add_PrefillServicer_to_server(self, server)

    async def start(self) -> Mapping[str, str]:
        await self._blocks.start()
        return self._blocks.addresses

    def join(self, agent: WorkerAgent) -> None:
        self._blocks.join(agent.info.epoch)
        self._agent = agent

    def complete(self, load: WorkerLoad) -> WorkerLoad:
        return load  # pullers measure the transfers

    async def close(self) -> None:
        await self._blocks.close()  # releases every publication
        if self._releases:
            await asyncio.wait(self._releases)
        for transport in self._transports:
            await transport.close()

    async def Prefill(
        self, request: pb.PrefillRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncGenerator[pb.PrefillEvent, None]:
        if self._agent is None:
            raise not_joined(Role.PREFILL)
        sequence = sequence_from_proto(request.sequence, self._fingerprint)
        logger = request_logger(log, sequence.request_id)
        work = EngineRequest(
            sequence.request_id,
            sequence.tokens,
            sequence.params,
            sequence.num_prompt,
            sequence.salt,
            export=True,
            deadline=deadline_of(context),
        )
        events = self._alone(work) if _ends_with_first_token(sequence) else self._offered(work, logger)
        async with aclosing(events):
            async for event in events:
                yield event

    async def _alone(self, work: EngineRequest) -> AsyncGenerator[pb.PrefillEvent, None]:
        """An answer of one token: nobody will want the blocks."""
        try:
            async with aclosing(self._engine.generate(work)) as outputs:
                async for output in outputs:
                    if output.finished:
                        yield self._done(output)
        finally:
            self._engine.release(work.request_id)

    async def _offered(self, work: EngineRequest, logger: ContextLogger) -> AsyncGenerator[pb.PrefillEvent, None]:
        """Publishes blocks as they become complete, and ends when they were pulled. A router that cancels before
        that has let go of the request: nobody will pull any more."""
        publication = self._blocks.publish(self._layout.blocks_for(len(work.tokens)))
        self._note(publication, TransferState.COMPUTING)
        self._release_later(work.request_id, publication, logger)
        try:
            yield pb.PrefillEvent(accepted=pb.PrefillAccepted(handle=_handle_to_proto(publication.handle)))
            async with aclosing(self._engine.generate(work)) as outputs:
                async for output in outputs:
                    self._publish(output, publication)
                    if output.finished:
                        logger.info(
                            "prefilled", extra={"tokens": len(work.tokens), "cached": output.cached_tokens}
                        )
                        yield self._done(output)
            while publication.release_reason is None:
                publication.touch()  # the router, which waits here, is alive
                with suppress(TimeoutError):
                    async with asyncio.timeout(_TOUCH_SECONDS):
                        await publication.released()
        finally:
            publication.fail("the router has let go of the request")

    def _done(self, output: EngineOutput) -> pb.PrefillEvent:
        self._metrics.observe_queue_time(output.queue_seconds)
        return pb.PrefillEvent(
            done=pb.PrefillDone(
                token=token_to_proto(output.tokens[0]),
                cached_tokens=output.cached_tokens,
                queue_seconds=output.queue_seconds,
            )
        )

    def _publish(self, output: EngineOutput, publication: Publication) -> None:
        complete = output.num_computed // self._layout.block_tokens
        ready = len(output.blocks) if output.finished else complete
        publication.ready(output.blocks[len(publication.block_ids) : ready])
        if output.finished:
            token = output.tokens[0]
            publication.finish(token.token, finished=token.finish_reason is not None)
            self._note(publication, TransferState.READY)

    def _release_later(self, request_id: str, publication: Publication, logger: ContextLogger) -> None:
        async def release() -> None:
            reason = await publication.released()
            self._engine.release(request_id)
            self._note(publication, TransferState.RELEASED)
            logger.info("blocks released", extra={"reason": reason.value})

        task = asyncio.create_task(release(), name=f"release {request_id}")
        self._releases.add(task)
        task.add_done_callback(self._releases.discard)

    def _note(self, publication: Publication, state: TransferState) -> None:
        """Tells the directory how far a transfer is."""
        if self._agent is not None:
            handle = publication.handle
            record = TransferRecord(handle.transfer_id, state, handle.source, None, handle.num_blocks)
            self._agent.record_transfer(record)


def _ends_with_first_token(sequence: SequenceRequest) -> bool:
    generated = len(sequence.tokens) - sequence.num_prompt
    return sequence.params.max_tokens is not None and sequence.params.max_tokens - generated <= 1


def _handle_to_proto(handle: KvHandle) -> pb.KvHandle:
    return pb.KvHandle(
        transfer_id=handle.transfer_id,
        secret=handle.secret,
        addresses=dict(handle.addresses),
        source=handle.source,
        epoch=handle.epoch,
        fingerprint=handle.fingerprint,
        num_blocks=handle.num_blocks,
    )
