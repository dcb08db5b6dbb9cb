"""One worker of each role in this process: a tiny engine, a real directory, gRPC, and the memory transport."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc.aio
from prometheus_client import CollectorRegistry

from decode_service.role import DecodeRole
from engine import AsyncEngine, Engine, EngineConfig, SamplingParams, open_model
from kvtransfer import BlockMemory, BlockServer, MemoryTransport, PullClient
from prefill_service.role import PrefillRole
from splitserve.agent import WorkerAgent
from splitserve.cluster import Role, WorkerInfo
from splitserve.directory import Directory
from splitserve.grpc_server import GrpcServer, open_channel
from splitserve.metrics import EngineMetrics, TransferMetrics
from splitserve.sequences import SequenceRequest, sequence_to_proto
from splitserve.v1 import worker_pb2 as pb

BLOCK_BYTES = 16 * 2 * 2 * 2 * 16 * 4  # tokens x heads x layers x K and V x head size x float32
POOL = 60 * BLOCK_BYTES
GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, seed=0)


@dataclass(frozen=True, slots=True)
class RunningRole:
    role: PrefillRole | DecodeRole
    engine: AsyncEngine
    channel: grpc.aio.Channel
    registry: CollectorRegistry

    @property
    def fingerprint(self) -> str:
        return self.engine.engine.runner.fingerprint.hex()

    @property
    def used_blocks(self) -> int:
        return self.engine.load().used_blocks

    def sequence(self, tokens: list[int], params: SamplingParams = GREEDY, name: str = "r") -> pb.Sequence:
        return sequence_to_proto(SequenceRequest(name, self.fingerprint, tokens, len(tokens), params))


def prompt(length: int, seed: int = 0) -> list[int]:
    draw = random.Random(seed)
    return [draw.randrange(256) for _ in range(length)]


def made_plausible(sequence: pb.Sequence, worker: RunningRole, seed: int) -> None:
    """Changes a made-up sequence so that it gets past the first checks, and not all of them every time."""
    draw = random.Random(seed)
    sequence.fingerprint = worker.fingerprint
    sequence.tokens.extend(range(draw.randint(1, 40)))
    sequence.tokens[:] = [token % 320 if draw.random() < 0.999 else token for token in sequence.tokens]
    sequence.num_prompt_tokens = len(sequence.tokens) if draw.random() < 0.7 else draw.randint(0, 40)
    if draw.random() < 0.7:
        sequence.sampling.Clear()
    if not sequence.sampling.HasField("max_tokens"):
        sequence.sampling.max_tokens = 4


def make_engine(model: Path) -> AsyncEngine:
    config = EngineConfig(
        str(model), dtype="float32", kv_cache_memory=POOL, threads=1, max_num_seqs=8, max_num_batched_tokens=16
    )
    return AsyncEngine(Engine(config, open_model(model)))


@asynccontextmanager
async def running_role(
    role: Role,
    model: Path,
    directory: Directory,
    info: WorkerInfo,
    transport: MemoryTransport,
    *,
    joined: bool = True,
    lease_seconds: float = 10.0,
) -> AsyncIterator[RunningRole]:
    """Asserts at the end, as a worker does, that the engine's books are in order."""
    registry = CollectorRegistry()
    metrics, transfers = EngineMetrics(registry, "tiny", role), TransferMetrics(registry, "tiny", role)
    engine = make_engine(model)
    runner = engine.engine.runner
    memory = BlockMemory(runner.memory(), runner.layout, runner.num_blocks)
    rest: tuple[Any, ...] = ([transport], runner.layout, runner.fingerprint.hex(), metrics)
    servicer: PrefillRole | DecodeRole
    if role is Role.PREFILL:
        server = BlockServer(
            memory, runner.fingerprint, info.id, 0, [transport], lease_seconds=lease_seconds, observer=transfers
        )
        servicer = PrefillRole(engine, server, *rest)
    else:
        pulls = PullClient(memory, runner.fingerprint, info.id, 0, [transport], 10.0, transfers)
        servicer = DecodeRole(engine, pulls, *rest)
    async with AsyncExitStack() as stack:
        await engine.start()
        stack.push_async_callback(engine.close)
        await servicer.start()
        stack.push_async_callback(servicer.close)
        grpc_server = GrpcServer("127.0.0.1", 0, [servicer.service], servicer.register, grace=0)
        await stack.enter_async_context(grpc_server)
        if joined:
            agent = WorkerAgent(
                directory,
                info,
                lambda: servicer.complete(engine.load()),
                engine.take_block_events,
                engine.known_hashes,
            )
            await stack.enter_async_context(agent)
            servicer.join(agent)
        channel = await stack.enter_async_context(open_channel(grpc_server.address))
        yield RunningRole(servicer, engine, channel, registry)
