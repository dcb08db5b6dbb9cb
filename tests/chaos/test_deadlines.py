"""Requests whose time is over before a worker comes to them."""

from __future__ import annotations

import asyncio
import itertools
import signal
from typing import Any

import httpx
import pytest

from tests.chaos.cluster import ChaosCluster
from tests.chaos.load import MODEL

pytestmark = pytest.mark.asyncio(loop_scope="session")

PROMPT = list(range(100))
_salts = itertools.count()


async def complete(cluster: ChaosCluster, client: httpx.AsyncClient, **headers: str) -> httpx.Response:
    body: dict[str, Any] = {"model": MODEL, "prompt": PROMPT, "max_tokens": 4, "temperature": 0}
    body["cache_salt"] = f"deadline-{next(_salts)}"
    return await client.post(f"{cluster.http_url}/v1/completions", json=body, headers=headers)


async def begun(cluster: ChaosCluster) -> float:
    """Tokens of prompts that engines have begun; a gauge may be half a second old."""
    await cluster.idle()
    await asyncio.sleep(0.6)
    return sum([await cluster.metric(name, "splitserve_prefix_cache_queries_total") for name in cluster.workers])


async def test_a_deadline_that_passes_in_the_queue_costs_no_step(cluster: ChaosCluster) -> None:
    async with httpx.AsyncClient(timeout=30) as client:
        before = await begun(cluster)
        assert (await complete(cluster, client)).status_code == 200
        cost = await begun(cluster) - before
        assert cost >= len(PROMPT)

        for name in cluster.workers:
            cluster.signal(name, signal.SIGSTOP)
        answers = await asyncio.gather(
            *(complete(cluster, client, **{"X-Request-Timeout": "0.3"}) for _ in range(8))
        )
        for name in cluster.workers:
            cluster.signal(name, signal.SIGCONT)

        assert {answer.status_code for answer in answers} == {504}
        assert {answer.json()["error"]["type"] for answer in answers} == {"timeout_error"}
        assert max(answer.elapsed.total_seconds() for answer in answers) < 5
        assert await begun(cluster) == before + cost, "the workers found nothing to do"
