"""Workers that follow a script, behind real gRPC servers and in a real directory: no model, no blocks.

Their model is a rule: the token with index i of any answer is ``FIRST + i``, so an answer that was pieced
together on several workers shows every token that is missing or there twice.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import AsyncExitStack, aclosing, asynccontextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

import grpc.aio
from prometheus_client import CollectorRegistry

from decode_service.feeds import Feeds
from router.backend import GenerationChunk, GenerationRequest, ModelSpec
from router.legs import Channels
from router.orchestrator import Orchestrator
from router.planner import Planner
from router.policy import PolicyConfig
from router.retry_budget import RetryBudget
from router.snapshot import ClusterView
from splitserve.cluster import Role, WorkerInfo
from splitserve.directory import Directory
from splitserve.grpc_server import GrpcServer
from splitserve.metrics import RouterMetrics
from splitserve.sampling import FinishReason, SamplingParams, TokenOutput
from splitserve.v1 import worker_pb2 as pb
from splitserve.v1 import worker_pb2_grpc
from splitserve.wire import token_to_proto

SECONDS = 60.0
FIRST = 1000
PROMPT = tuple(range(100))
SERVICES = {Role.PREFILL: "splitserve.v1.Prefill", Role.DECODE: "splitserve.v1.Decode"}


class MakeWorker(Protocol):
    def __call__(self, id: str = ..., role: Role = ..., **changes: Any) -> WorkerInfo: ...


@dataclass(frozen=True, slots=True)
class Fault:
    """What goes wrong in one call: after so many good messages (prefill) or tokens (decode) it raises, or (no
    error) ends the stream, or (``hangs``) says nothing any more. Before that it waits until the workers have seen
    ``calls`` calls."""

    after: int = 0
    error: Exception | None = None
    hangs: bool = False
    calls: int = 0


@dataclass(slots=True)
class Call:
    """One call as a worker saw it."""

    worker: str
    role: Role
    sequence: pb.Sequence
    source: str | None = None  # whose handle it brought
    cancelled: bool = False
    ended: asyncio.Event = field(default_factory=asyncio.Event)


class Script:
    """What all workers of a cluster do: the next call of a role takes the next fault of that role, if any."""

    def __init__(self, stop_at: int | None = None, always: Exception | None = None) -> None:
        self.stop_at = stop_at  # index of a token that ends the answer by itself
        self.always = None if always is None else Fault(0, always)  # for calls that no other fault is meant for
        self.faults: dict[Role, deque[Fault | None]] = {role: deque() for role in Role}
        self.calls: list[Call] = []

    def by_role(self, role: Role) -> list[Call]:
        return [call for call in self.calls if call.role is role]

    def token(self, sequence: pb.Sequence, index: int) -> pb.Token:
        reason = None
        if index + 1 == sequence.sampling.max_tokens:
            reason = FinishReason.LENGTH
        if index == self.stop_at:
            reason = FinishReason.STOP
        return token_to_proto(TokenOutput(index, FIRST + index, finish_reason=reason))

    async def play(self, fault: Fault) -> None:
        while len(self.calls) < fault.calls:
            await asyncio.sleep(0.005)
        if fault.hangs:
            await asyncio.Event().wait()
        if fault.error is not None:
            raise fault.error

    @asynccontextmanager
    async def call(self, call: Call) -> AsyncIterator[Fault | None]:
        self.calls.append(call)
        faults = self.faults[call.role]
        try:
            yield faults.popleft() if faults else self.always
        except (asyncio.CancelledError, GeneratorExit):
            call.cancelled = True
            raise
        finally:
            call.ended.set()


class ScriptedWorker(worker_pb2_grpc.PrefillServicer, worker_pb2_grpc.DecodeServicer):
    def __init__(self, id: str, role: Role, script: Script) -> None:
        self._id = id
        self._role = role
        self._script = script
        self._feeds = Feeds()

    def register(self, server: grpc.aio.Server) -> None:
        if self._role is Role.PREFILL:
            worker_pb2_grpc.add_PrefillServicer_to_server(self, server)
        else:
            worker_pb2_grpc.add_DecodeServicer_to_server(self, server)

    async def Prefill(
        self, request: pb.PrefillRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncGenerator[pb.PrefillEvent, None]:
        sequence = request.sequence
        given = len(sequence.tokens) - sequence.num_prompt_tokens
        events = []
        if given + 1 < sequence.sampling.max_tokens:
            handle = pb.KvHandle(source=self._id, num_blocks=-(-len(sequence.tokens) // 16))
            events.append(pb.PrefillEvent(accepted=pb.PrefillAccepted(handle=handle)))
        done = pb.PrefillDone(token=self._script.token(sequence, given), cached_tokens=16)
        events.append(pb.PrefillEvent(done=done))
        async with self._script.call(Call(self._id, self._role, sequence)) as fault:
            for event in events[: None if fault is None else fault.after]:
                yield event
            if fault is not None:
                await self._script.play(fault)

    async def Decode(
        self, request: pb.DecodeRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncGenerator[pb.DecodeEvent, None]:
        sequence, pulls = request.sequence, request.HasField("handle")
        given = len(sequence.tokens) - sequence.num_prompt_tokens + pulls
        end = sequence.sampling.max_tokens if self._script.stop_at is None else self._script.stop_at + 1
        call = Call(self._id, self._role, sequence, request.handle.source if pulls else None)
        async with self._script.call(call) as fault:
            yield pb.DecodeEvent(accepted=pb.DecodeAccepted())
            feed = self._feeds.find(request.slot.feed)
            with nullcontext() if feed is None else feed.used():
                for index in range(given, end if fault is None else given + fault.after):
                    tokens = pb.DecodeTokens(tokens=[self._script.token(sequence, index)], cached_tokens=32)
                    if feed is None:
                        yield pb.DecodeEvent(tokens=tokens)
                    else:
                        feed.put(request.slot.number, tokens)
            if fault is not None:
                await self._script.play(fault)

    async def Feed(
        self, request: pb.FeedRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncGenerator[pb.FeedEvent, None]:
        async with aclosing(self._feeds.events()) as events:
            async for event in events:
                yield event


class ScriptedCluster:
    """Workers ``prefill-0 …`` and ``decode-0 …`` that a real orchestrator sends requests to."""

    def __init__(self, script: Script, view: ClusterView, orchestrator: Orchestrator, spec: ModelSpec) -> None:
        self.script = script
        self.view = view
        self.servers: dict[str, GrpcServer] = {}
        self.registry = CollectorRegistry()
        self._orchestrator = orchestrator
        self._spec = spec

    def generate(
        self, *, max_tokens: int = 6, prompt: tuple[int, ...] = PROMPT, deadline: float | None = None
    ) -> AsyncGenerator[GenerationChunk, None]:
        sampling = SamplingParams(max_tokens=max_tokens, seed=1)
        request = GenerationRequest("r", self._spec.name, prompt, sampling, deadline=deadline)
        return self._orchestrator.generate(request, self._spec)

    def usable(self) -> set[str]:
        """Workers that requests may be sent to."""
        pool = self.view.pool(self._spec.name)
        return set() if pool is None else {state.info.id for state in pool.states}

    async def tokens(self, **options: Any) -> list[TokenOutput]:
        return [token async for chunk in self.generate(**options) for token in chunk.tokens]


@asynccontextmanager
async def scripted(
    directory: Directory,
    make_worker: MakeWorker,
    spec: ModelSpec,
    script: Script,
    *,
    prefill: int = 2,
    decode: int = 2,
    max_retries: int = 2,
) -> AsyncIterator[ScriptedCluster]:
    """Asserts at the end that the router counts no request as in flight. Nothing hangs for longer than SECONDS."""
    channels = Channels()
    async with asyncio.timeout(SECONDS), AsyncExitStack() as stack:
        servers = {}
        for role, count in ((Role.PREFILL, prefill), (Role.DECODE, decode)):
            for i in range(count):
                worker = ScriptedWorker(f"{role}-{i}", role, script)
                server = GrpcServer("127.0.0.1", 0, [SERVICES[role]], worker.register, grace=0)
                servers[f"{role}-{i}"] = await stack.enter_async_context(server)
                info = make_worker(
                    f"{role}-{i}", role, model=spec.name, fingerprint=spec.fingerprint, grpc_address=server.address
                )
                await directory.register(info)
        view = await stack.enter_async_context(ClusterView(directory, refresh_seconds=3600))
        stack.push_async_callback(channels.close)
        registry = CollectorRegistry()
        planner = Planner(directory, view, PolicyConfig(decode_only_tokens=16))
        orchestrator = Orchestrator(planner, view, channels, RouterMetrics(registry), max_retries, RetryBudget())
        cluster = ScriptedCluster(script, view, orchestrator, spec)
        cluster.servers, cluster.registry = servers, registry
        yield cluster
        assert all(state.load.num_waiting == 0 for state in view.states())
