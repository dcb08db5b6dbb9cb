"""Messages that no client of ours would send: the public gRPC API never takes them for a bug of its own."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator

import grpc
import grpc.aio
import pytest
import pytest_asyncio
from hypothesis import given
from hypothesis import strategies as st

from router.backend import ModelSpec
from router.echo import EchoBackend
from router.grpc_front import SERVICE, InferenceServicer
from splitserve.grpc_server import GrpcServer, open_channel
from splitserve.v1 import inference_pb2 as pb
from splitserve.v1 import inference_pb2_grpc
from tests.protobuf import FUZZ, messages, status_of

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def channel(spec: ModelSpec) -> AsyncIterator[grpc.aio.Channel]:
    backend = EchoBackend([spec])

    def register(server: grpc.aio.Server) -> None:
        inference_pb2_grpc.add_InferenceServicer_to_server(InferenceServicer(backend), server)

    async with (
        GrpcServer("127.0.0.1", 0, [SERVICE], register, grace=0.5, public=True) as server,
        open_channel(server.address) as opened,
    ):
        yield opened
    assert backend.active == 0


@FUZZ
@given(request=messages(pb.GenerateRequest))
async def test_no_request_is_our_fault(channel: grpc.aio.Channel, request: pb.GenerateRequest) -> None:
    request.model = "echo"
    assert await status_of(channel, f"/{SERVICE}/Generate", request.SerializeToString()) in (
        "OK",
        "INVALID_ARGUMENT",
    )


@FUZZ
@given(request=st.binary(max_size=200))
@pytest.mark.parametrize("method", ["Generate", "ListModels"])
async def test_bytes_that_are_no_message_are_refused(
    channel: grpc.aio.Channel, method: str, request: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    status = await status_of(channel, f"/{SERVICE}/{method}", request)
    assert status in ("OK", "INVALID_ARGUMENT", "NOT_FOUND")
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]
