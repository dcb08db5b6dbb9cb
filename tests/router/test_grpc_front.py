"""The public gRPC API over a real server."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from router.admission import tenant_salt
from router.backend import ModelSpec
from router.echo import EchoBackend, EchoConfig
from router.grpc_front import SERVICE, InferenceServicer
from splitserve.api_keys import ApiKey, Keyring
from splitserve.errors import InvalidRequest, NotFound, Overloaded
from splitserve.grpc_server import GrpcServer, error_from_rpc, open_channel
from splitserve.v1 import inference_pb2 as pb
from splitserve.v1 import inference_pb2_grpc, sampling_pb2


@asynccontextmanager
async def serve(spec: ModelSpec, config: EchoConfig | None = None) -> AsyncIterator[tuple[Any, EchoBackend]]:
    backend = EchoBackend([spec], config)

    def register(server: grpc.aio.Server) -> None:
        inference_pb2_grpc.add_InferenceServicer_to_server(InferenceServicer(backend), server)

    async with GrpcServer("127.0.0.1", 0, [SERVICE], register, grace=0.5) as server:
        async with open_channel(server.address) as channel:
            yield inference_pb2_grpc.InferenceStub(channel), backend


async def test_text_is_continued(spec: ModelSpec) -> None:
    async with serve(spec, EchoConfig(cached_tokens=3)) as (stub, _):
        request = pb.GenerateRequest(model="echo", text="Grüße 👋, world", request_id="mine")
        messages = [message async for message in stub.Generate(request)]
    assert "".join(message.text for message in messages) == "Grüße 👋, world"
    assert {message.request_id for message in messages} == {"mine"}
    last = messages[-1]
    assert last.finish_reason == sampling_pb2.FINISH_REASON_STOP
    assert last.usage.completion_tokens == last.usage.prompt_tokens + 1
    assert last.usage.cached_tokens == 3
    assert not any(message.HasField("usage") for message in messages[:-1])


async def test_tokens_are_continued_with_logprobs(spec: ModelSpec) -> None:
    async with serve(spec) as (stub, backend):
        request = pb.GenerateRequest(
            tokens=pb.TokenIds(ids=[19556, 905]),
            sampling=sampling_pb2.SamplingParams(logprobs=2, max_tokens=2, seed=5),
            cache_salt="tenant",
        )
        tokens = [token async for message in stub.Generate(request) for token in message.tokens]
    assert [(token.index, token.id) for token in tokens] == [(0, 19556), (1, 905)]
    assert list(tokens[0].logprobs.top_ids) == [19556, 19557]
    assert tokens[1].finish_reason == sampling_pb2.FINISH_REASON_LENGTH
    [seen] = backend.requests
    assert seen.sampling.seed == 5
    assert seen.cache_salt == tenant_salt("", "tenant") != ""


async def test_unset_max_tokens_is_what_the_context_leaves(spec: ModelSpec) -> None:
    async with serve(spec) as (stub, backend):
        async for _ in stub.Generate(pb.GenerateRequest(text="a")):
            pass
    assert backend.requests[0].sampling.max_tokens == 399


async def test_stop_strings_end_the_answer(spec: ModelSpec) -> None:
    async with serve(spec) as (stub, backend):
        request = pb.GenerateRequest(text="one two three", sampling=sampling_pb2.SamplingParams(stop=["two"]))
        messages = [message async for message in stub.Generate(request)]
    assert "".join(message.text for message in messages) == "one "
    assert messages[-1].finish_reason == sampling_pb2.FINISH_REASON_STOP
    assert backend.active == 0


async def test_a_cancelled_call_ends_its_work(spec: ModelSpec) -> None:
    async with serve(spec, EchoConfig(token_delay=0.01)) as (stub, backend):
        sampling = sampling_pb2.SamplingParams(ignore_eos=True)
        call = stub.Generate(pb.GenerateRequest(text="a", sampling=sampling))
        await call.read()
        call.cancel()
        async with asyncio.timeout(30):
            while backend.active:
                await asyncio.sleep(0.005)
    assert backend.cancelled == 1


async def test_the_callers_deadline_reaches_the_backend(spec: ModelSpec) -> None:
    async with serve(spec, EchoConfig(first_delay=60)) as (stub, backend):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.Generate(pb.GenerateRequest(text="a"), timeout=1.5).read()
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert backend.requests[0].deadline is not None
        async with asyncio.timeout(30):
            while backend.active:
                await asyncio.sleep(0.005)


@pytest.mark.parametrize(
    ("request_", "error", "field"),
    [
        (pb.GenerateRequest(), InvalidRequest, "prompt"),
        (pb.GenerateRequest(text=""), InvalidRequest, "prompt"),
        (pb.GenerateRequest(text="a", model="nope"), NotFound, "model"),
        (pb.GenerateRequest(tokens=pb.TokenIds(ids=[2**31])), InvalidRequest, "prompt"),
        (pb.GenerateRequest(tokens=pb.TokenIds(ids=[5] * 512)), InvalidRequest, "prompt"),
        (pb.GenerateRequest(text="a", request_id="x" * 129), InvalidRequest, "request_id"),
        (pb.GenerateRequest(text="a", cache_salt="x" * 129), InvalidRequest, "cache_salt"),
        (
            pb.GenerateRequest(text="a", sampling=sampling_pb2.SamplingParams(top_p=float("nan"))),
            InvalidRequest,
            "top_p",
        ),
        (
            pb.GenerateRequest(text="a", sampling=sampling_pb2.SamplingParams(max_tokens=0)),
            InvalidRequest,
            "max_tokens",
        ),
    ],
)
async def test_bad_requests_name_their_field(spec: ModelSpec, request_: Any, error: Any, field: str) -> None:
    async with serve(spec) as (stub, _):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.Generate(request_).read()
    raised = error_from_rpc(caught.value)
    assert type(raised) is error
    assert raised.field == field
    assert field in raised.message


async def test_failures_of_the_backend_keep_their_kind(spec: ModelSpec) -> None:
    async with serve(spec, EchoConfig(failure=Overloaded("full", 7.0), fail_after=1)) as (stub, _):
        call = stub.Generate(pb.GenerateRequest(text="a b c"))
        assert (await call.read()).text == "a"
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call.read()
    raised = error_from_rpc(caught.value)
    assert isinstance(raised, Overloaded)
    assert raised.retry_after == 7.0


async def test_models_are_listed(spec: ModelSpec) -> None:
    async with serve(spec) as (stub, _):
        [card] = (await stub.ListModels(pb.ListModelsRequest())).models
    assert (card.id, card.max_model_len, card.prefill_workers, card.decode_workers) == ("echo", 512, 1, 1)


async def test_with_keys_nothing_answers_without_one(spec: ModelSpec) -> None:
    backend, keyring = EchoBackend([spec]), Keyring([ApiKey.of("sk-one", "alice")])

    def register(server: grpc.aio.Server) -> None:
        inference_pb2_grpc.add_InferenceServicer_to_server(InferenceServicer(backend, keyring=keyring), server)

    async with (
        GrpcServer("127.0.0.1", 0, [SERVICE], register, grace=0.5, keyring=keyring, public=True) as server,
        open_channel(server.address) as channel,
    ):
        stub = inference_pb2_grpc.InferenceStub(channel)
        reflection = reflection_pb2_grpc.ServerReflectionStub(channel)
        health = health_pb2_grpc.HealthStub(channel)
        asked = reflection_pb2.ServerReflectionRequest(list_services="")
        for call in (
            stub.ListModels(pb.ListModelsRequest()),
            stub.Generate(pb.GenerateRequest(text="a")).read(),
            reflection.ServerReflectionInfo(iter([asked])).read(),
            health.Watch(health_pb2.HealthCheckRequest()).read(),
        ):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call
            assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
        assert (await health.Check(health_pb2.HealthCheckRequest())).status
        key = (("authorization", "Bearer sk-one"),)
        assert (await stub.ListModels(pb.ListModelsRequest(), metadata=key)).models
        async for _ in stub.Generate(pb.GenerateRequest(text="a"), metadata=key):
            pass
    assert len(backend.requests) == 1
    assert backend.requests[0].cache_salt
