from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import grpc.aio
import pytest
from tokenizers import Tokenizer, models

from router.catalog import Catalog
from router.legs import Channels
from splitserve.cluster import WorkerInfo
from splitserve.errors import Unavailable
from splitserve.grpc_server import GrpcServer
from splitserve.model_info import ModelDescription, description_to_proto
from splitserve.v1 import worker_pb2 as pb
from splitserve.v1 import worker_pb2_grpc
from tests.router.scripted import MakeWorker

DESCRIPTION = ModelDescription(
    model="tiny",
    fingerprint="ab" * 32,
    tokenizer_json=Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a")).to_str().encode(),
    chat_template="{{ messages[0].content }}",
    special_tokens={"bos_token": "a"},
    eos_token_ids=(1, 7),
    max_model_len=512,
    vocab_size=2,
    block_tokens=16,
    max_sequence_tokens=16_000,
    generation_defaults={"temperature": 0.25},
)


class Teller(worker_pb2_grpc.WorkerServicer):
    """Tells what it serves, and counts how often it was asked."""

    def __init__(self, description: ModelDescription) -> None:
        self.asked = 0
        self.description = description

    async def GetModel(
        self, request: pb.GetModelRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> pb.ModelInfo:
        self.asked += 1
        return description_to_proto(self.description)


@pytest.fixture
async def catalog() -> AsyncIterator[Catalog]:
    channels = Channels()
    yield Catalog(channels)
    await channels.close()


@asynccontextmanager
async def telling(make_worker: MakeWorker, **changes: Any) -> AsyncIterator[tuple[Teller, WorkerInfo]]:
    teller = Teller(replace(DESCRIPTION, **changes))

    def register(server: grpc.aio.Server) -> None:
        worker_pb2_grpc.add_WorkerServicer_to_server(teller, server)

    async with GrpcServer("127.0.0.1", 0, ["splitserve.v1.Worker"], register, grace=0) as server:
        yield teller, make_worker(grpc_address=server.address)


async def test_a_model_is_learned_from_its_worker(catalog: Catalog, make_worker: MakeWorker) -> None:
    async with telling(make_worker) as (_, worker):
        spec = await catalog.spec([worker])
    assert (spec.name, spec.fingerprint, spec.eos_token_ids) == ("tiny", "ab" * 32, frozenset({1, 7}))
    assert (spec.max_model_len, spec.vocab_size, spec.block_tokens) == (512, 2, 16)
    assert spec.generation_defaults == {"temperature": 0.25}
    assert spec.tokenizer.encode("b") == [1]


async def test_requests_that_come_together_ask_once(catalog: Catalog, make_worker: MakeWorker) -> None:
    async with telling(make_worker) as (teller, worker):
        specs = await asyncio.gather(*(catalog.spec([worker]) for _ in range(10)))
        assert teller.asked == 1
    assert len({id(spec) for spec in specs}) == 1


async def test_the_smallest_pool_limits_a_sequence(catalog: Catalog, make_worker: MakeWorker) -> None:
    async with telling(make_worker) as (_, worker):
        spec = await catalog.spec([worker, replace(worker, id="small", num_blocks=10)])
    assert spec.max_sequence_tokens == 160


async def test_a_worker_that_does_not_answer_is_passed_over(catalog: Catalog, make_worker: MakeWorker) -> None:
    async with telling(make_worker) as (_, worker):
        dead = make_worker("dead", grpc_address="127.0.0.1:1")
        assert (await catalog.spec([dead, worker])).name == "tiny"


async def test_a_worker_that_serves_something_else_is_not_believed(
    catalog: Catalog, make_worker: MakeWorker
) -> None:
    async with telling(make_worker, fingerprint="cd" * 32) as (_, liar):
        with pytest.raises(Unavailable, match="no worker of tiny says what it serves"):
            await catalog.spec([liar])


async def test_when_nobody_answers_a_later_request_asks_again(catalog: Catalog, make_worker: MakeWorker) -> None:
    with pytest.raises(Unavailable, match="no worker of tiny says what it serves"):
        await catalog.spec([make_worker(grpc_address="127.0.0.1:1")])
    async with telling(make_worker) as (_, worker):
        assert (await catalog.spec([worker])).name == "tiny"


async def test_what_nobody_serves_is_forgotten(catalog: Catalog, make_worker: MakeWorker) -> None:
    async with telling(make_worker) as (teller, worker):
        await catalog.spec([worker])
        catalog.forget_all_but({("tiny", "ab" * 32)})
        await catalog.spec([worker])
        assert teller.asked == 1
        catalog.forget_all_but(set())
        await catalog.spec([worker])
        assert teller.asked == 2
