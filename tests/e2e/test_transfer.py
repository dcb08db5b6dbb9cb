"""KV blocks on their way out of a real prefill worker. The test itself is the router and the decode worker."""

from __future__ import annotations

import asyncio
import random
import re
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace

import grpc.aio
import httpx
import numpy as np
import pytest

from engine import LLM, EngineRequest, SamplingParams
from kvtransfer import BlockMemory, KvHandle, PullClient, PullResult, Reason, available_transports, make_transports
from splitserve.children import Child
from splitserve.cluster import Role
from splitserve.directory import Directory
from splitserve.directory_records import TransferState
from splitserve.errors import Incompatible, TransferFailed
from splitserve.grpc_server import open_channel
from splitserve.redis_server import PrivateRedis
from splitserve.sequences import SequenceRequest, sequence_to_proto
from splitserve.v1 import worker_pb2 as pb
from splitserve.v1 import worker_pb2_grpc
from tests.e2e.conftest import worker

LENGTH, CHUNK = 1024, 256
BLOCKS = LENGTH // 16
CHUNKED = LENGTH // CHUNK
POOL = 512 << 20
GREEDY = SamplingParams(temperature=0, max_tokens=32, seed=0)


@dataclass(frozen=True, slots=True)
class Source:
    """A prefill worker in a process of its own, with the Redis that it has joined."""

    child: Child
    redis_url: str

    def metric(self, name: str) -> float:
        text = httpx.get(self.child.addresses["metrics"] + "/metrics").text
        [value] = re.findall(rf"^splitserve_{name}{{.*}} ([\d.e+-]+)$", text, re.MULTILINE)
        return float(value)

    async def idle(self) -> None:
        """No block is held any more; the gauge is refreshed twice a second."""
        async with asyncio.timeout(20):
            while await asyncio.to_thread(self.metric, "kv_cache_usage_perc"):
                await asyncio.sleep(0.05)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Source]:
    """Asserts at the end that the worker drained: exit code 0 means that its books were in order."""
    directory = tmp_path_factory.mktemp("source")
    redis = PrivateRedis(directory)
    with asyncio.Runner() as runner:
        runner.run(redis.start())
        config = worker(
            Role.PREFILL, "smollm2", "source", kv_cache_memory=POOL, max_num_batched_tokens=CHUNK, cores=(0,)
        )
        child = Child("source", replace(config, redis_url=redis.url), directory)
        runner.run(child.start())
        try:
            runner.run(child.ready(60))
            yield Source(child, redis.url)
        finally:
            code = runner.run(child.stop())
            runner.run(redis.close())
    assert code == 0


@pytest.fixture(scope="module")
def llm() -> LLM:
    """The same model, chunks and threads in this process."""
    return LLM("smollm2", dtype="float32", kv_cache_memory=POOL, max_num_batched_tokens=CHUNK, threads=1)


@pytest.fixture(params=available_transports())
def transport(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def prompt(seed: int, llm: LLM) -> list[int]:
    draw = random.Random(seed)
    return [draw.randrange(llm.engine.vocab_size) for _ in range(LENGTH)]


@dataclass(slots=True)
class Prefill:
    """One call of Prefill and what was seen of it."""

    handle: KvHandle
    done: asyncio.Task[pb.PrefillDone]
    cancel: Callable[[], bool]
    arrived: list[int] = field(default_factory=lambda: [0])  # blocks, after each progress

    def count(self, blocks: int) -> None:
        self.arrived.append(blocks)


@asynccontextmanager
async def prefill(source: Source, llm: LLM, tokens: list[int]) -> AsyncIterator[Prefill]:
    fingerprint = llm.engine.runner.fingerprint.hex()
    sequence = SequenceRequest(f"r{random.random()}", fingerprint, tokens, len(tokens), GREEDY)
    async with asyncio.timeout(60), open_channel(source.child.addresses["grpc"]) as channel:
        call = worker_pb2_grpc.PrefillStub(channel).Prefill(
            pb.PrefillRequest(sequence=sequence_to_proto(sequence))
        )
        message = (await call.read()).accepted.handle
        handle = KvHandle(
            message.transfer_id,
            message.secret,
            dict(message.addresses),
            message.source,
            message.epoch,
            message.fingerprint,
            message.num_blocks,
        )

        async def finish() -> pb.PrefillDone:
            done: pb.PrefillDone = (await call.read()).done
            return done

        done = asyncio.create_task(finish())
        try:
            yield Prefill(handle, done, call.cancel)
        finally:
            call.cancel()
            await asyncio.wait([done])


@dataclass(frozen=True, slots=True)
class Sink:
    """The decode worker's side: a pool and its client."""

    pool: np.ndarray
    client: PullClient

    async def pull(self, work: Prefill, handle: KvHandle | None = None) -> PullResult:
        return await self.client.pull(handle or work.handle, range(BLOCKS), on_progress=work.count)


@asynccontextmanager
async def sink(llm: LLM, transport: str, fingerprint: bytes | None = None) -> AsyncIterator[Sink]:
    runner = llm.engine.runner
    pool = np.zeros((BLOCKS, runner.layout.block_bytes), dtype=np.uint8)
    memory, transports = BlockMemory(pool, runner.layout, BLOCKS), make_transports([transport])
    async with PullClient(memory, fingerprint or runner.fingerprint, "sink", 1, transports) as client:
        yield Sink(pool, client)
    await transports[0].close()


def computed_here(llm: LLM, tokens: list[int]) -> tuple[np.ndarray, int]:
    """The blocks of a prompt and its first token, from the engine in this process."""
    engine = llm.engine
    engine.add(EngineRequest("here", tokens, GREEDY, export=True))
    while True:
        for _, output in engine.step().outputs:
            if output.finished:
                pool = np.frombuffer(engine.runner.memory(), dtype=np.uint8)
                blocks = pool.reshape(-1, engine.runner.layout.block_bytes)[list(output.blocks)]
                engine.release("here")
                return blocks, output.tokens[0].token


async def test_blocks_and_first_token_are_those_of_the_engine(source: Source, llm: LLM, transport: str) -> None:
    tokens = prompt(1 if transport == "tcp" else 2, llm)
    expected, first = await asyncio.to_thread(computed_here, llm, tokens)
    async with sink(llm, transport) as here:
        async with prefill(source, llm, tokens) as work:
            result = await here.pull(work)
            done = await work.done
        assert result.transport == transport
        assert result.bytes == BLOCKS * llm.engine.runner.layout.block_bytes
        assert result.first_token == done.token.id == first
        assert np.array_equal(here.pool, expected), "bit by bit: same kernels, chunks and threads"
    assert llm.generate(tokens, SamplingParams(temperature=0, max_tokens=1))[0].tokens == [first]
    await source.idle()


async def test_most_blocks_arrive_while_the_prompt_is_being_read(source: Source, llm: LLM, transport: str) -> None:
    async with sink(llm, transport) as here:
        async with prefill(source, llm, prompt(3 if transport == "tcp" else 4, llm)) as work:
            before: list[int] = []
            work.done.add_done_callback(lambda _: before.append(work.arrived[-1]))
            await here.pull(work)
            await work.done
            await asyncio.sleep(0)
    assert work.arrived == sorted(work.arrived) and work.arrived[-1] == BLOCKS
    assert before[0] >= BLOCKS * 2 // 3, f"of {BLOCKS} blocks in {CHUNKED} chunks"


async def test_redis_shows_how_far_a_transfer_is(source: Source, llm: LLM) -> None:
    seen = []
    async with Directory(source.redis_url) as directory, sink(llm, "tcp") as here:

        async def until(state: TransferState, transfer: bytes) -> None:
            while (record := await directory.transfer(transfer)) is None or record.state is not state:
                await asyncio.sleep(0.01)
            assert (record.source, record.num_blocks) == ("source", BLOCKS)
            seen.append(state)

        async with prefill(source, llm, prompt(5, llm)) as work:
            await until(TransferState.COMPUTING, work.handle.transfer_id)
            await work.done
            await until(TransferState.READY, work.handle.transfer_id)
            await here.pull(work)
            await until(TransferState.RELEASED, work.handle.transfer_id)
    assert len(seen) == 3


@pytest.mark.parametrize("with_call", [False, True], ids=["pull", "pull-and-call"])
async def test_a_cancelled_pull_frees_the_blocks(
    source: Source, llm: LLM, transport: str, with_call: bool
) -> None:
    async with sink(llm, transport) as here:
        async with prefill(source, llm, prompt(10 + 2 * with_call + (transport == "tcp"), llm)) as work:
            pull = asyncio.create_task(here.pull(work))
            while work.arrived[-1] < BLOCKS // CHUNKED:
                await asyncio.sleep(0.005)
            pull.cancel()
            if with_call:
                work.cancel()
            await asyncio.wait([pull, work.done])
            assert pull.cancelled() and work.arrived[-1] < BLOCKS
            if not with_call:
                assert isinstance(work.done.exception(), grpc.aio.AioRpcError), "the call ends, and not well"
            after = here.pool.copy()
            await source.idle()
        assert np.array_equal(after, here.pool), "no byte is written any more"


async def test_a_foreign_secret_or_epoch_is_refused_and_the_worker_goes_on(
    source: Source, llm: LLM, transport: str
) -> None:
    async with sink(llm, transport) as here:
        async with prefill(source, llm, prompt(20 + (transport == "tcp"), llm)) as work:
            for foreign in (
                replace(work.handle, secret=bytes(16)),
                replace(work.handle, epoch=work.handle.epoch + 1),
            ):
                with pytest.raises(TransferFailed) as refused:
                    await here.pull(work, foreign)
                assert refused.value.reason == Reason.REFUSED and not here.pool.any()
            with pytest.raises(TransferFailed) as unknown:
                await here.pull(work, replace(work.handle, transfer_id=bytes(16)))
            assert unknown.value.reason == Reason.EXPIRED
            assert (await here.pull(work)).blocks == BLOCKS
    await source.idle()


async def test_a_puller_with_another_layout_is_refused_and_the_worker_goes_on(
    source: Source, llm: LLM, transport: str
) -> None:
    other = bytes(32)
    async with prefill(source, llm, prompt(30 + (transport == "tcp"), llm)) as work:
        async with sink(llm, transport, fingerprint=other) as stranger:
            with pytest.raises(Incompatible):
                await stranger.pull(work)  # it sees the difference itself
            with pytest.raises(Incompatible):
                await stranger.pull(work, replace(work.handle, fingerprint=other))  # the source does
            assert not stranger.pool.any()
        async with sink(llm, transport) as here:
            assert (await here.pull(work)).blocks == BLOCKS
    await source.idle()
