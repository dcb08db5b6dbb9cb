"""All workers fail all requests for a while: retries must not multiply their load."""

from __future__ import annotations

import asyncio

import grpc.aio
import pytest

from tests.chaos.cluster import ChaosCluster
from tests.chaos.load import Answer, Case, ask
from tests.chaos.test_overload import LONG

pytestmark = pytest.mark.asyncio(loop_scope="session")

CASE = Case(0, tuple(range(40)), 4)
RATE = 30.0  # requests a second
SECONDS = 10.0 if LONG else 3.0


async def open_loop(channel: grpc.aio.Channel, rate: float, seconds: float) -> list[Answer]:
    asked = []
    for _ in range(round(rate * seconds)):
        asked.append(asyncio.ensure_future(ask(channel, CASE)))
        await asyncio.sleep(1 / rate)
    return await asyncio.gather(*asked)


async def test_when_all_workers_fail_retries_add_a_fifth_of_the_load_at_most(
    cluster: ChaosCluster, channel: grpc.aio.Channel
) -> None:
    await asyncio.sleep(10)  # the load of scenarios before this one no longer counts
    before = cluster.calls()
    with cluster.failing():
        answers = await open_loop(channel, RATE, SECONDS)
    calls = cluster.calls() - before
    print(f"{len(answers)} requests, calls {dict(calls)}")
    assert all(answer.error for answer in answers)
    assert calls.total() > len(answers) / 2, "they did come to the workers"
    assert max(calls.values()) <= 1.2 * len(answers)
    async with asyncio.timeout(30):
        while (await ask(channel, CASE)).error is not None:
            await asyncio.sleep(0.1)
