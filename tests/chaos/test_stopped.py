"""Processes that are stopped: connected, and silent."""

from __future__ import annotations

import asyncio
import signal

import grpc.aio
import pytest

from splitserve.config import RouterConfig
from tests.chaos.cluster import SECONDS, ChaosCluster
from tests.chaos.load import Case, Oracle, ask, cases

pytestmark = pytest.mark.asyncio(loop_scope="session")

[SHORT] = cases(1, seed=5)
LONG = Case(1, SHORT.prompt * 3, 100)


def deadline(cluster: ChaosCluster) -> float:
    config = cluster.children["router"].config
    assert isinstance(config, RouterConfig)
    return config.worker_timeout + 0.5


async def test_a_stopped_decode_worker_is_given_up_and_its_late_tokens_reach_nobody(
    cluster: ChaosCluster, channel: grpc.aio.Channel
) -> None:
    expected = await ask(channel, LONG)
    before = await cluster.retries("decode")
    armed = cluster.arm("decode", "token", 50, "stop")

    async def wake(tokens: int) -> None:
        """The stopped one goes on while its successor does."""
        if tokens == 70:
            assert not armed.exists()
            for name in ("decode-0", "decode-1"):
                cluster.signal(name, signal.SIGCONT)

    answer = await ask(channel, LONG, on_token=wake)
    assert answer.error is None and answer.tokens == expected.tokens
    assert await cluster.retries("decode") == before + 1
    assert 1 < answer.gap < deadline(cluster) + expected.first + 0.5


async def test_a_stopped_prefill_worker_costs_nobody_an_answer(
    cluster: ChaosCluster, channel: grpc.aio.Channel, oracle: Oracle
) -> None:
    before = await cluster.retries()
    cluster.arm("prefill-0", "prefill", 8, "stop")
    result = await oracle.run(channel, at_once=32)
    result.assert_all_right()
    assert await cluster.retries() > before


@pytest.mark.skipif(not SECONDS, reason="takes a minute: make chaos")
@pytest.mark.parametrize("name", ["prefill-0", "decode-0"])
async def test_a_worker_stopped_for_half_a_minute_under_load_costs_nobody_an_answer_and_comes_back(
    cluster: ChaosCluster, channel: grpc.aio.Channel, oracle: Oracle, name: str
) -> None:
    loop = asyncio.get_running_loop()
    loading = asyncio.create_task(oracle.run(channel, at_once=32))
    await asyncio.sleep(0.2)
    cluster.signal(name, signal.SIGSTOP)
    woken, gap = loop.time() + 30, 0.0
    while loop.time() < woken:
        result = await loading
        result.assert_all_right()
        gap = max(gap, result.longest_gap)
        loading = asyncio.create_task(oracle.run(channel, at_once=32))
    before = len(cluster.planned(name))
    cluster.signal(name, signal.SIGCONT)  # what it sends now is of requests that others have answered
    (await loading).assert_all_right()
    async with asyncio.timeout(30):
        while len(cluster.planned(name)) == before:
            (await oracle.run(channel)).assert_all_right()
    print(f"\n{name} stopped for 30 s: no answer paused for more than {gap:.2f} s")
    assert gap < deadline(cluster) + 1  # the time to a first token under load, and a retry's
