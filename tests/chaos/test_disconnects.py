"""Clients that leave, and answers that nobody can give."""

from __future__ import annotations

import asyncio
import time

import grpc.aio
import pytest

from splitserve.v1 import inference_pb2 as pb
from splitserve.v1 import inference_pb2_grpc
from tests.chaos.cluster import ChaosCluster
from tests.chaos.load import UNAVAILABLE, Case, ask, cases

pytestmark = pytest.mark.asyncio(loop_scope="session")

LONG = Case(2, cases(1, seed=5)[0].prompt * 3, 3000)


@pytest.mark.parametrize("patience", [0.01, 0.05, 0.3], ids=["at once", "early", "in the answer"])
async def test_clients_that_leave_free_their_blocks_within_a_second(
    cluster: ChaosCluster, channel: grpc.aio.Channel, patience: float
) -> None:
    stub = inference_pb2_grpc.InferenceStub(channel)
    calls = [
        stub.Generate(
            pb.GenerateRequest(model="tiny", tokens=pb.TokenIds(ids=LONG.prompt), sampling=LONG.sampling)
        )
        for _ in range(8)
    ]
    await asyncio.sleep(patience)
    for call in calls:
        call.cancel()
    await cluster.idle(1.0)
    assert all(call.cancelled() for call in calls)


async def test_without_decode_workers_the_answer_is_an_error_at_once(
    cluster: ChaosCluster, channel: grpc.aio.Channel
) -> None:
    await asyncio.gather(*(cluster.kill(f"decode-{i}") for i in range(2)))
    began = time.monotonic()
    answer = await ask(channel, LONG)
    assert answer.error is not None and answer.error.startswith(UNAVAILABLE)
    assert time.monotonic() - began < 2
    async with asyncio.timeout(20):  # once their leases have ended
        while await cluster.status("prefill-0", "/ready") != 503:
            await asyncio.sleep(0.05)
    assert await cluster.status("prefill-0", "/live") == 200
