from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc.aio
import pytest

from kvtransfer import BlockMemory, KvHandle, MemoryTransport, PullClient
from splitserve.cluster import Role, WorkerInfo
from splitserve.directory import Directory
from splitserve.errors import EngineError, Incompatible, InvalidRequest, SplitServeError, Unavailable
from splitserve.grpc_errors import error_from_rpc
from splitserve.v1 import worker_pb2 as pb
from splitserve.v1 import worker_pb2_grpc
from tests.roles import BLOCK_BYTES, GREEDY, RunningRole, prompt, running_role
from tests.tiny_models import make_tiny

Open = Callable[..., AbstractAsyncContextManager[RunningRole]]
LONG = 400  # tokens; the engine reads 16 a step


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("models"))


@pytest.fixture
def transport() -> MemoryTransport:
    return MemoryTransport()


@pytest.fixture
def prefill(
    model: Path, directory: Directory, make_worker: Callable[..., WorkerInfo], transport: MemoryTransport
) -> Open:
    info = make_worker("prefill-0", Role.PREFILL)
    return lambda **options: running_role(Role.PREFILL, model, directory, info, transport, **options)


def call(worker: RunningRole, sequence: pb.Sequence) -> Any:
    return worker_pb2_grpc.PrefillStub(worker.channel).Prefill(pb.PrefillRequest(sequence=sequence), timeout=60)


async def refused(call: Any) -> SplitServeError:
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        while await call.read() is not grpc.aio.EOF:
            pass
    return error_from_rpc(raised.value)


async def idle(worker: RunningRole) -> None:
    async with asyncio.timeout(30):
        while worker.used_blocks:
            await asyncio.sleep(0.005)
    await worker.engine.check_integrity()


@pytest.fixture
async def puller(transport: MemoryTransport) -> AsyncIterator[Callable[[RunningRole, int], PullClient]]:
    clients = []

    def make(worker: RunningRole, blocks: int) -> PullClient:
        layout, fingerprint = worker.engine.engine.runner.layout, worker.engine.engine.runner.fingerprint
        memory = BlockMemory(bytearray(blocks * BLOCK_BYTES), layout, blocks)
        clients.append(PullClient(memory, fingerprint, "sink", 1, [transport]))
        return clients[-1]

    yield make
    for client in clients:
        await client.close()


def handle_of(message: pb.KvHandle) -> KvHandle:
    names = ("transfer_id", "secret", "source", "epoch", "fingerprint", "num_blocks")
    return KvHandle(addresses=dict(message.addresses), **{name: getattr(message, name) for name in names})


async def test_before_it_has_joined_it_refuses(prefill: Open) -> None:
    async with prefill(joined=False) as worker:
        error = await refused(call(worker, worker.sequence(prompt(20))))
    assert isinstance(error, Unavailable) and "has not joined" in error.message


async def test_a_sequence_of_another_model_is_refused(prefill: Open) -> None:
    async with prefill() as worker:
        sequence = worker.sequence(prompt(20))
        sequence.fingerprint = "00" * 32
        assert isinstance(await refused(call(worker, sequence)), Incompatible)


async def test_a_prompt_over_the_context_is_refused_and_leaves_nothing(prefill: Open) -> None:
    async with prefill() as worker:
        assert isinstance(await refused(call(worker, worker.sequence(prompt(600)))), InvalidRequest)
        await idle(worker)


async def test_one_token_is_answered_without_a_transfer(prefill: Open) -> None:
    async with prefill() as worker:
        stream = call(worker, worker.sequence(prompt(40), replace(GREEDY, max_tokens=1)))
        event = await stream.read()
        assert event.HasField("done") and await stream.read() is grpc.aio.EOF
        await idle(worker)


async def test_blocks_that_nobody_asks_for_are_freed_when_the_lease_ends(prefill: Open) -> None:
    async with prefill(lease_seconds=0.8) as worker:
        # less than the second after which the router's open stream would renew the lease
        stream = call(worker, worker.sequence(prompt(LONG)))
        assert (await stream.read()).accepted.handle.num_blocks == LONG // 16
        assert (await stream.read()).HasField("done")
        assert worker.used_blocks == LONG // 16, "held for whoever comes"
        await idle(worker)
        labels = {"model_name": "tiny", "role": "prefill"}
        assert worker.registry.get_sample_value("splitserve_kv_lease_expired_total", labels) == 1


async def test_blocks_that_were_pulled_are_freed_and_stay_cached(
    prefill: Open, puller: Callable[[RunningRole, int], PullClient]
) -> None:
    async with prefill() as worker:
        stream = call(worker, worker.sequence(prompt(LONG)))
        handle = handle_of((await stream.read()).accepted.handle)
        result = await puller(worker, LONG // 16).pull(handle, range(LONG // 16))
        assert result.first_token == (await stream.read()).done.token.id
        await idle(worker)
        again = call(worker, worker.sequence(prompt(LONG), name="again"))
        await again.read()
        assert (await again.read()).done.cached_tokens >= LONG - 16


async def test_a_call_that_is_cancelled_while_it_computes_frees_its_blocks(prefill: Open) -> None:
    async with prefill() as worker:
        for i in range(5):
            stream = call(worker, worker.sequence(prompt(LONG, i), name=f"r{i}"))
            await stream.read()
            stream.cancel()
        await idle(worker)


async def test_a_puller_that_leaves_while_it_computes_ends_the_call(
    prefill: Open, puller: Callable[[RunningRole, int], PullClient]
) -> None:
    async with prefill() as worker:
        client, arrived = puller(worker, LONG // 16), asyncio.Event()
        stream = call(worker, worker.sequence(prompt(LONG)))
        handle = handle_of((await stream.read()).accepted.handle)
        pull = asyncio.create_task(client.pull(handle, range(LONG // 16), on_progress=lambda _: arrived.set()))
        await arrived.wait()
        pull.cancel()
        await asyncio.wait([pull])
        assert isinstance(await refused(stream), EngineError)
        await idle(worker)
