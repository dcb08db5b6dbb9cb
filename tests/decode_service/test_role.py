from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

import grpc.aio
import pytest

from engine import EngineRequest
from kvtransfer import BlockMemory, BlockServer, MemoryTransport, Publication, Reason, ReleaseReason
from splitserve.cluster import Role, WorkerInfo, WorkerLoad
from splitserve.directory import Directory
from splitserve.errors import Incompatible, SplitServeError, TransferFailed, Unavailable
from splitserve.grpc_errors import error_from_rpc
from splitserve.v1 import worker_pb2 as pb
from splitserve.v1 import worker_pb2_grpc
from tests.roles import BLOCK_BYTES, GREEDY, RunningRole, prompt, running_role
from tests.tiny_models import make_tiny

Open = Callable[..., AbstractAsyncContextManager[RunningRole]]
BLOCKS = 5
TOKENS = prompt(BLOCKS * 16)
BYTES = "splitserve_kv_transfer_bytes_total"
LABELS = {"model_name": "tiny", "role": "decode", "transport": "memory"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("models"))


@pytest.fixture
def transport() -> MemoryTransport:
    return MemoryTransport()


@pytest.fixture
async def source(transport: MemoryTransport, worker: RunningRole) -> AsyncIterator[BlockServer]:
    """A source whose blocks the tests publish by hand."""
    runner = worker.engine.engine.runner
    memory = BlockMemory(bytearray(8 * BLOCK_BYTES), runner.layout, 8)
    async with BlockServer(memory, runner.fingerprint, "prefill-0", 1, [transport]) as server:
        yield server


@pytest.fixture
def decode(
    model: Path, directory: Directory, make_worker: Callable[..., WorkerInfo], transport: MemoryTransport
) -> Open:
    info = make_worker("decode-0", Role.DECODE)
    return lambda **options: running_role(Role.DECODE, model, directory, info, transport, **options)


@pytest.fixture
async def worker(decode: Open) -> AsyncIterator[RunningRole]:
    async with decode() as running:
        yield running


def call(worker: RunningRole, handle: Publication | None = None, name: str = "r", tokens: Any = None) -> Any:
    request = pb.DecodeRequest(sequence=worker.sequence(list(tokens or TOKENS), name=name))
    if handle is not None:
        fields = handle.handle
        request.handle.CopyFrom(
            pb.KvHandle(
                transfer_id=fields.transfer_id,
                secret=fields.secret,
                addresses=dict(fields.addresses),
                source=fields.source,
                epoch=fields.epoch,
                fingerprint=fields.fingerprint,
                num_blocks=fields.num_blocks,
            )
        )
    return worker_pb2_grpc.DecodeStub(worker.channel).Decode(request, timeout=60)


async def tokens_of(stream: Any) -> tuple[list[int], int]:
    """The answer, and how many tokens of the prompt were cached."""
    events = [event.tokens async for event in stream if event.HasField("tokens")]
    return [t.id for event in events for t in event.tokens], events[0].cached_tokens if events else 0


async def refused(stream: Any) -> SplitServeError:
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await tokens_of(stream)
    return error_from_rpc(raised.value)


async def arrived(worker: RunningRole, blocks: int) -> None:
    """So many blocks are here: the pull is under way, and its source knows it."""
    async with asyncio.timeout(30):
        while worker.registry.get_sample_value(BYTES, LABELS) != float(blocks * BLOCK_BYTES):
            await asyncio.sleep(0.005)


async def idle(worker: RunningRole) -> None:
    async with asyncio.timeout(30):
        while worker.used_blocks:
            await asyncio.sleep(0.005)
    await worker.engine.check_integrity()


async def test_before_it_has_joined_it_refuses(decode: Open) -> None:
    async with decode(joined=False) as worker:
        error = await refused(call(worker))
    assert isinstance(error, Unavailable) and "has not joined" in error.message


async def test_without_a_handle_it_computes_the_prompt_itself(worker: RunningRole) -> None:
    answer, cached = await tokens_of(call(worker))
    assert (len(answer), cached) == (8, 0)
    await idle(worker)


async def test_a_request_with_a_slot_has_its_tokens_in_the_feed(
    worker: RunningRole, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("decode_service.feeds.UNUSED_SECONDS", 2.0)
    alone, cached = await tokens_of(call(worker))
    stub = worker_pb2_grpc.DecodeStub(worker.channel)
    feed = aiter(stub.Feed(pb.FeedRequest(), timeout=60))
    number = (await anext(feed)).feed
    sequence = worker.sequence(TOKENS, name="fed")
    events = stub.Decode(pb.DecodeRequest(sequence=sequence, slot=pb.FeedSlot(feed=number, number=3)), timeout=60)
    assert [event.WhichOneof("event") async for event in events] == ["accepted"]
    entries = [entry async for event in feed for entry in event.tokens]  # ends by itself
    assert {entry.slot for entry in entries} == {3}
    assert [token.id for entry in entries for token in entry.tokens.tokens] == alone
    assert entries[0].tokens.cached_tokens == (BLOCKS - 1) * 16 > cached
    await idle(worker)


async def test_a_request_whose_feed_has_ended_is_answered_itself(worker: RunningRole) -> None:
    request = pb.DecodeRequest(sequence=worker.sequence(TOKENS), slot=pb.FeedSlot(feed=1, number=3))
    answer, _ = await tokens_of(worker_pb2_grpc.DecodeStub(worker.channel).Decode(request, timeout=60))
    assert len(answer) == 8


@pytest.mark.parametrize("blocks", [BLOCKS - 1, BLOCKS + 1])
async def test_a_handle_with_another_number_of_blocks_is_refused(
    worker: RunningRole, source: BlockServer, blocks: int
) -> None:
    error = await refused(call(worker, source.publish(blocks)))
    assert isinstance(error, Incompatible) and f"a handle of {blocks} blocks" in error.message
    await idle(worker)


async def test_its_load_tells_how_fast_blocks_arrived(worker: RunningRole, source: BlockServer) -> None:
    assert worker.role.complete(WorkerLoad(num_running=3)) == WorkerLoad(num_running=3)
    publication = source.publish(BLOCKS)
    publication.ready(range(BLOCKS))
    publication.finish(1, False)
    await tokens_of(call(worker, publication))
    assert worker.role.complete(WorkerLoad()).transfer_bytes_per_second > 0
    await idle(worker)


async def test_what_arrived_before_a_pull_failed_stays_cached(worker: RunningRole, source: BlockServer) -> None:
    publication = source.publish(BLOCKS)
    failure = asyncio.create_task(refused(call(worker, publication)))
    publication.ready([0, 1, 2])
    await arrived(worker, 3)
    publication.fail("the prefill was cancelled")
    error = await failure
    assert isinstance(error, TransferFailed) and error.reason == Reason.SOURCE_FAILED
    await idle(worker)
    assert (await tokens_of(call(worker, name="again")))[1] == 3 * 16


async def test_a_pull_that_fails_behind_a_partial_last_block_keeps_the_full_ones(
    worker: RunningRole, source: BlockServer
) -> None:
    tokens = TOKENS[:-10]
    publication = source.publish(BLOCKS)
    failure = asyncio.create_task(refused(call(worker, publication, tokens=tokens)))
    publication.ready(list(range(BLOCKS)))
    await arrived(worker, BLOCKS)
    publication.fail("the prefill was cancelled")
    assert isinstance(await failure, TransferFailed)
    await idle(worker)
    assert (await tokens_of(call(worker, name="again", tokens=tokens)))[1] == (BLOCKS - 1) * 16


async def test_a_source_that_is_gone_costs_nothing(worker: RunningRole, source: BlockServer) -> None:
    publication = source.publish(BLOCKS)
    await source.close()
    error = await refused(call(worker, publication))
    assert isinstance(error, TransferFailed) and error.reason == Reason.CONNECT
    await idle(worker)
    assert (await tokens_of(call(worker, name="again")))[1] == 0


async def test_an_answer_that_ended_with_its_first_token_has_no_more(
    worker: RunningRole, source: BlockServer
) -> None:
    publication = source.publish(BLOCKS)
    publication.ready(list(range(BLOCKS)))
    publication.finish(65, finished=True)
    assert await tokens_of(call(worker, publication)) == ([], 0)
    await idle(worker)


async def test_a_call_that_is_cancelled_while_it_pulls_gives_its_blocks_back(
    worker: RunningRole, source: BlockServer
) -> None:
    publication = source.publish(BLOCKS)
    publication.ready([0])
    stream = call(worker, publication)
    await stream.read()
    await arrived(worker, 1)
    stream.cancel()
    async with asyncio.timeout(30):
        assert await publication.released() is ReleaseReason.CANCELLED
    await idle(worker)


async def test_blocks_that_are_cached_here_are_not_pulled(worker: RunningRole, source: BlockServer) -> None:
    answer, _ = await tokens_of(call(worker))
    publication = source.publish(BLOCKS)
    publication.ready(list(range(BLOCKS)))
    publication.finish(answer[0], finished=False)
    rest, _ = await tokens_of(call(worker, publication, name="again"))
    assert rest == answer[1:], "the source's blocks are zeros: the cached ones were used"


async def test_a_prompt_goes_through_both_roles(
    worker: RunningRole,
    model: Path,
    directory: Directory,
    make_worker: Callable[..., WorkerInfo],
    transport: MemoryTransport,
) -> None:
    tokens = prompt(200, seed=9)
    info = make_worker("prefill-0", Role.PREFILL)
    async with running_role(Role.PREFILL, model, directory, info, transport) as other:
        sequence = other.sequence(tokens)
        first = worker_pb2_grpc.PrefillStub(other.channel).Prefill(
            pb.PrefillRequest(sequence=sequence), timeout=20
        )
        handle = (await first.read()).accepted.handle
        stub = worker_pb2_grpc.DecodeStub(worker.channel)
        rest, _ = await tokens_of(stub.Decode(pb.DecodeRequest(sequence=sequence, handle=handle), timeout=60))
        token = (await first.read()).done.token.id
        outputs = other.engine.generate(EngineRequest("alone", tokens, GREEDY))
        assert [token, *rest] == [t.token async for output in outputs for t in output.tokens]
