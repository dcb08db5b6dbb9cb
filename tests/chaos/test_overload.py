"""More requests than the workers can answer: what fits is answered in time, the rest is refused at once.

For ten times the load the workers take a fixed time for each step, so that their speed is known and the processor
has room for the load: part of the long version only, because it needs a machine with nothing else to do.
`python -m bench.overload` measures a real model.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import replace

import httpx
import numpy as np
import pytest
import pytest_asyncio

from bench.datasets import Conversation, Turn
from bench.http_client import Server
from bench.load import Client
from bench.metrics import Slo
from bench.openai_api import Api
from bench.overload import Load, at_rate, overload
from splitserve.config import RouterConfig
from tests.chaos.cluster import ChaosCluster
from tests.chaos.load import MODEL

pytestmark = pytest.mark.asyncio(loop_scope="session")

LONG = bool(os.environ.get("SPLITSERVE_CHAOS_SECONDS"))
STEP_SECONDS = 0.1
PROMPT = 128  # tokens: two steps of a prefill worker
RATE = 2 / (2 * STEP_SECONDS)  # requests a second of two prefill workers
TTFT_SLO = 1.0


@pytest_asyncio.fixture(loop_scope="session")
async def load(cluster: ChaosCluster) -> AsyncIterator[Load]:
    """Slow workers behind a router of their own, which refuses early."""
    shared = cluster.children["router"].config
    assert isinstance(shared, RouterConfig)
    await cluster.start("strict", replace(shared, ttft_slo=TTFT_SLO, max_concurrent_requests=64))
    with cluster.paced(STEP_SECONDS):
        rng = np.random.default_rng(1)
        url = cluster.children["strict"].addresses["http"]
        client = Client(Server.parse(url), Api(MODEL, False, "tokens", ignore_eos=True), 60.0)

        def make(count: int) -> list[Conversation]:
            return [Conversation((Turn(rng.integers(0, 256, PROMPT).tolist(), 4),)) for _ in range(count)]

        yield Load(client, make, Slo({"ttft": 2000.0}), rng)
    assert await cluster.children.pop("strict").stop() == 0


@pytest.mark.skipif(not LONG, reason="needs an idle machine: make chaos")
async def test_ten_times_the_load_leaves_most_of_the_goodput_and_is_refused_at_once(load: Load) -> None:
    await at_rate(load, RATE / 2, 2)  # the workers measure their speed
    peak = await at_rate(load, RATE * 0.8, 20)
    result = await overload(load, replace(peak, goodput=RATE), 10, 60, 10)
    print(peak.describe(), result.over.describe(), result.after.describe(), result.recovery, sep="\n")
    assert not (peak.failed or result.over.failed or result.after.failed)
    assert len(result.over.refused) > 0.7 * RATE * 10 * 60
    assert result.over.goodput > 0.6 * RATE
    assert np.percentile(result.over.refused, 50) < 0.05


async def test_a_router_refuses_more_than_its_limit_and_takes_them_once_there_is_room(
    cluster: ChaosCluster,
) -> None:
    shared = cluster.children["router"].config
    assert isinstance(shared, RouterConfig)
    await cluster.start("narrow", replace(shared, port=0, grpc_port=0, max_concurrent_requests=2))
    endless = {"model": MODEL, "prompt": list(range(40)), "max_tokens": 3000, "stream": True, "ignore_eos": True}
    short = {"model": MODEL, "prompt": [1, 2, 3], "max_tokens": 2}
    url = cluster.children["narrow"].addresses["http"]
    async with httpx.AsyncClient(base_url=url, timeout=30) as client, asyncio.timeout(60):
        async with AsyncExitStack() as streams:
            lines = []
            for _ in range(2):
                stream = client.stream("POST", "/v1/completions", json=endless)
                lines.append((await streams.enter_async_context(stream)).aiter_lines())
                await anext(lines[-1])
            refused = await client.post("/v1/completions", json=short)
            assert refused.status_code == 429 and int(refused.headers["retry-after"]) >= 1
        while (taken := await client.post("/v1/completions", json=short)).status_code == 429:
            await asyncio.sleep(0.02)
        assert taken.status_code == 200
    assert await cluster.children.pop("narrow").stop() == 0
