"""Messages that no router would send: a decode worker refuses them and stays whole."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtransfer import MemoryTransport
from splitserve.cluster import Role, WorkerInfo
from splitserve.directory import Directory
from splitserve.v1 import worker_pb2 as pb
from tests.protobuf import FUZZ, messages, status_of
from tests.roles import RunningRole, made_plausible, running_role
from tests.tiny_models import make_tiny

METHOD = "/splitserve.v1.Decode/Decode"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("models"))


@pytest.fixture
async def worker(
    model: Path, directory: Directory, make_worker: Callable[..., WorkerInfo]
) -> AsyncIterator[RunningRole]:
    info = make_worker("decode-0", Role.DECODE)
    async with running_role(Role.DECODE, model, directory, info, MemoryTransport()) as running:
        yield running
        async with asyncio.timeout(30):
            while running.used_blocks:
                await asyncio.sleep(0.01)


@FUZZ
@given(
    request=messages(pb.DecodeRequest),
    plausible=st.sampled_from([True, True, True, False]),
    seed=st.integers(0, 99),
)
async def test_no_message_breaks_the_worker(
    worker: RunningRole, request: pb.DecodeRequest, plausible: bool, seed: int, caplog: pytest.LogCaptureFixture
) -> None:
    request.sequence.request_id += str(seed)
    if plausible:
        made_plausible(request.sequence, worker, seed)
        if request.HasField("handle"):
            request.handle.num_blocks = -(-len(request.sequence.tokens) // 16)
            request.handle.addresses["memory"] = "nowhere"
            request.handle.fingerprint = bytes.fromhex(worker.fingerprint)
    status = await status_of(worker.channel, METHOD, request.SerializeToString())
    assert status in (
        "OK",
        "INVALID_ARGUMENT",
        "FAILED_PRECONDITION",  # another model
        "UNAVAILABLE",  # blocks that are nowhere
    )
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


@FUZZ
@given(request=st.binary(max_size=200))
async def test_bytes_that_are_no_message_are_refused(worker: RunningRole, request: bytes) -> None:
    assert await status_of(worker.channel, METHOD, request) in ("INVALID_ARGUMENT", "FAILED_PRECONDITION")
