from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from splitserve import errors
from splitserve.errors import ConfigError, SplitServeError
from splitserve.grpc_errors import error_from_rpc
from splitserve.grpc_server import GrpcServer, check_health, open_channel
from splitserve.v1 import inference_pb2 as pb
from splitserve.v1 import inference_pb2_grpc

SERVICE = "splitserve.v1.Inference"

Behaviour = Callable[[], Awaitable[None]]


async def nothing() -> None:
    """A behaviour without incident."""


class Servicer(inference_pb2_grpc.InferenceServicer):
    """Does as told, between two messages."""

    def __init__(self, behaviour: Behaviour = nothing) -> None:
        self._behaviour = behaviour
        self.closed = asyncio.Event()

    async def ListModels(self, request: pb.ListModelsRequest, context: Any) -> pb.ListModelsResponse:
        await self._behaviour()
        return pb.ListModelsResponse(models=[pb.ModelCard(id="m")])

    async def Generate(self, request: pb.GenerateRequest, context: Any) -> AsyncIterator[pb.GenerateResponse]:
        try:
            yield pb.GenerateResponse(text="a")
            await self._behaviour()
            yield pb.GenerateResponse(text="b")
        finally:
            self.closed.set()


@asynccontextmanager
async def serving(
    servicer: inference_pb2_grpc.InferenceServicer, **options: Any
) -> AsyncIterator[tuple[GrpcServer, Any]]:
    def register(server: grpc.aio.Server) -> None:
        inference_pb2_grpc.add_InferenceServicer_to_server(servicer, server)

    async with GrpcServer("127.0.0.1", 0, [SERVICE], register, grace=0.1, **options) as server:
        async with open_channel(server.address) as channel:
            yield server, inference_pb2_grpc.InferenceStub(channel)


def raising(error: BaseException) -> Behaviour:
    async def behave() -> None:
        raise error

    return behave


TREE: list[SplitServeError] = [
    errors.InvalidRequest("top_p must be in (0, 1]", "top_p"),
    errors.RequestTooLarge("too long"),
    errors.Unauthenticated("who are you?"),
    errors.NotFound("no such model", "model"),
    errors.Overloaded("full", 2.5),
    errors.Unavailable("no worker", 3.0),
    errors.TransferFailed("gone", "stalled"),
    errors.DeadlineExceeded("late"),
    errors.Incompatible("another model: größer"),
    errors.EngineError("nan"),
]


@pytest.mark.parametrize("raised", TREE, ids=[type(e).__name__ for e in TREE])
async def test_an_error_arrives_as_what_it_was(raised: SplitServeError) -> None:
    async with serving(Servicer(raising(raised))) as (_, stub):
        for call in (stub.ListModels(pb.ListModelsRequest()), drain(stub.Generate(pb.GenerateRequest()))):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call
            assert caught.value.code().name == raised.grpc_status
            arrived = error_from_rpc(caught.value)
            assert type(arrived) is type(raised)
            assert vars(arrived) == vars(raised)


async def drain(call: Any) -> list[str]:
    return [message.text async for message in call]


async def test_messages_arrive_in_order() -> None:
    async with serving(Servicer()) as (_, stub):
        assert await drain(stub.Generate(pb.GenerateRequest())) == ["a", "b"]
        assert (await stub.ListModels(pb.ListModelsRequest())).models[0].id == "m"


async def test_an_unexpected_error_says_nothing_to_the_peer_and_all_to_the_log(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with serving(Servicer(raising(KeyError("secret")))) as (_, stub):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.ListModels(pb.ListModelsRequest())
    assert caught.value.code() is grpc.StatusCode.INTERNAL
    assert caught.value.details() == "internal error"
    assert "KeyError: 'secret'" in caplog.text
    assert [record.name for record in caplog.records if record.levelno >= logging.ERROR] == [
        "splitserve.grpc_errors"
    ]


async def test_an_expected_error_is_not_logged_as_one(caplog: pytest.LogCaptureFixture) -> None:
    async with serving(Servicer(raising(errors.Overloaded("full")))) as (_, stub):
        for call in (stub.ListModels(pb.ListModelsRequest()), drain(stub.Generate(pb.GenerateRequest()))):
            with pytest.raises(grpc.aio.AioRpcError):
                await call
    assert caplog.records == []


async def test_cancelling_closes_the_servicers_generator_and_logs_no_error(
    caplog: pytest.LogCaptureFixture,
) -> None:
    servicer = Servicer(asyncio.Event().wait)  # type: ignore[arg-type]
    async with serving(servicer) as (_, stub):
        call = stub.Generate(pb.GenerateRequest())
        assert (await call.read()).text == "a"
        call.cancel()
        async with asyncio.timeout(30):
            await servicer.closed.wait()
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


async def test_a_client_deadline_closes_the_servicers_generator() -> None:
    servicer = Servicer(asyncio.Event().wait)  # type: ignore[arg-type]
    async with serving(servicer) as (_, stub):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await drain(stub.Generate(pb.GenerateRequest(), timeout=1.5))
        assert type(error_from_rpc(caught.value)) is errors.DeadlineExceeded
        async with asyncio.timeout(30):
            await servicer.closed.wait()


async def test_a_server_that_is_not_there_is_unavailable() -> None:
    async with open_channel("127.0.0.1:1") as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await inference_pb2_grpc.InferenceStub(channel).ListModels(pb.ListModelsRequest(), timeout=30)
    assert type(error_from_rpc(caught.value)) is errors.PeerLost


async def test_stopping_cancels_open_calls_after_the_grace_as_unavailable() -> None:
    servicer = Servicer(asyncio.Event().wait)  # type: ignore[arg-type]
    async with serving(servicer) as (server, stub):
        call = stub.Generate(pb.GenerateRequest())
        assert (await call.read()).text == "a"
        await server.stop()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call.read()
        async with asyncio.timeout(30):
            await servicer.closed.wait()
    assert type(error_from_rpc(caught.value)) is errors.PeerLost


async def test_a_long_message_is_cut_to_what_a_trailer_can_carry() -> None:
    async with serving(Servicer(raising(errors.InvalidRequest("x" * 100_000)))) as (_, stub):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.ListModels(pb.ListModelsRequest())
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_health_follows_readiness() -> None:
    async with serving(Servicer()) as (server, _):
        assert not await check_health(server.address, SERVICE)
        await server.ready()
        assert await check_health(server.address, SERVICE)
        assert await check_health(server.address)
        await server.not_ready(SERVICE)
        assert not await check_health(server.address)
    assert not await check_health(server.address, SERVICE)


async def test_an_unknown_service_has_no_health(caplog: pytest.LogCaptureFixture) -> None:
    async with serving(Servicer()) as (server, _), open_channel(server.address) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service="nobody"))
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND
    assert caplog.records == []


async def test_reflection_lists_the_services() -> None:
    async with serving(Servicer()) as (server, _), open_channel(server.address) as channel:
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        call = stub.ServerReflectionInfo(iter([reflection_pb2.ServerReflectionRequest(list_services="")]))
        answers = [answer async for answer in call]
    listed = {service.name for service in answers[0].list_services_response.service}
    assert listed == {SERVICE, "grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection"}


async def test_a_port_in_use_is_one_clear_line(caplog: pytest.LogCaptureFixture) -> None:
    async with serving(Servicer()) as (server, _):
        with pytest.raises(ConfigError, match=f"cannot listen on 127.0.0.1:{server.port}"):
            await GrpcServer("127.0.0.1", server.port, [], lambda _: None).start()


async def test_messages_of_many_megabytes_pass_and_larger_ones_do_not() -> None:
    async with serving(Servicer()) as (_, stub):
        await drain(stub.Generate(pb.GenerateRequest(text="x" * (15 << 20))))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await drain(stub.Generate(pb.GenerateRequest(text="x" * (17 << 20))))
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


class Talkative(inference_pb2_grpc.InferenceServicer):
    """Answers with 100 messages of 1 MB."""

    def __init__(self) -> None:
        self.closed = asyncio.Event()

    async def Generate(self, request: pb.GenerateRequest, context: Any) -> AsyncIterator[pb.GenerateResponse]:
        try:
            for _ in range(100):
                yield pb.GenerateResponse(text="a" * 1_000_000)
        finally:
            self.closed.set()


async def test_a_caller_who_takes_no_message_is_given_up_and_others_are_not(
    caplog: pytest.LogCaptureFixture,
) -> None:
    servicer = Talkative()
    async with serving(servicer, write_seconds=0.3) as (_, stub):
        call = stub.Generate(pb.GenerateRequest())
        assert len((await call.read()).text) == 1_000_000
        async with asyncio.timeout(30):  # it reads no more
            await servicer.closed.wait()
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                while await call.read() is not grpc.aio.EOF:
                    pass
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert not [record for record in caplog.records if record.levelno >= logging.ERROR]
        assert [len(message.text) async for message in stub.Generate(pb.GenerateRequest())] == [1_000_000] * 100
