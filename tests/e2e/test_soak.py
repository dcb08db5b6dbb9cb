"""Mixed load with clients that leave at any point, for a while: nothing may leak, and no answer may change.

``SPLITSERVE_SOAK_SECONDS`` says for how long (default 20; ``make soak``: 600).
"""

from __future__ import annotations

import asyncio
import os
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import pytest

from kvtransfer.idle import MAX_IDLE
from splitserve.cluster import Role
from tests.e2e.conftest import RunningCluster, running, worker

SECONDS = float(os.environ.get("SPLITSERVE_SOAK_SECONDS", "20"))
WARM_UP = 0.3  # share of the time after which nothing may grow any more
CLIENTS = 12
BLOCK_BYTES = 16 * 2 * 2 * 2 * 16 * 4  # of the tiny model: tokens x heads x layers x K and V x head size x float32
BLOCKS = 40  # a long request takes 30 of them
WORKERS = ("prefill-0", "prefill-1", "decode-0", "decode-1")
REQUESTS = 48  # different ones; the load repeats them
# a worker keeps up to MAX_IDLE connections to each of two partners, of 3 descriptors and a task each
CONNECTIONS = 2 * MAX_IDLE
GROWTH_BYTES, GROWTH_FDS, GROWTH_TASKS = 64 << 20, 8 + 3 * CONNECTIONS, 4 + CONNECTIONS


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory, tiny_path: Callable[..., str]) -> Iterator[RunningCluster]:
    """Two workers of each role, with pools so small that requests are preempted."""
    options = {"served_model_name": "tiny", "kv_cache_memory": BLOCKS * BLOCK_BYTES, "max_num_batched_tokens": 128}
    workers = [
        worker(
            Role(name.partition("-")[0]),
            tiny_path(),
            name,
            cores=(int(name[-1]) % (os.cpu_count() or 1),),
            **options,
        )
        for name in WORKERS
    ]
    with running(workers, tmp_path_factory.mktemp("soak"), decode_only_tokens=16) as cluster:
        yield cluster


def make_request(seed: int) -> dict[str, Any]:
    """Greedy, so that it can be compared."""
    draw = random.Random(seed)
    length = draw.choice([3, 10, 30, 60, 120, 200, 350])
    body: dict[str, Any] = {
        "model": "tiny",
        "prompt": [draw.randrange(256) for _ in range(length)],
        "max_tokens": draw.choice([1, 2, 8, 30, 60, 100]),
        "temperature": 0,
        "ignore_eos": draw.random() < 0.7,
        "stream": draw.random() < 0.5,
    }
    if draw.random() < 0.2:
        body["n"] = 3
    if draw.random() < 0.3:
        body["logprobs"] = draw.randrange(4)
    if draw.random() < 0.3:
        body["stop"] = [chr(draw.randrange(97, 123)), "zz"]
    return body


async def ask(client: httpx.AsyncClient, body: dict[str, Any]) -> list[str]:
    """The texts of all choices."""
    if not body["stream"]:
        response = await client.post("/v1/completions", json=body)
        assert response.status_code == 200, response.text
        return [choice["text"] for choice in response.json()["choices"]]
    texts = [""] * body.get("n", 1)
    async with client.stream("POST", "/v1/completions", json=body) as response:
        assert response.status_code == 200, await response.aread()
        async for line in response.aiter_lines():
            if line.startswith("data: ") and line != "data: [DONE]":
                event = httpx.Response(200, text=line.removeprefix("data: ")).json()
                assert "error" not in event, event
                for choice in event["choices"]:
                    texts[choice["index"]] += choice["text"]
    return texts


@dataclass(frozen=True, slots=True)
class Use:
    """What a process has in use."""

    rss: float  # bytes
    fds: float
    tasks: float


def metrics_urls(cluster: RunningCluster) -> dict[str, str]:
    return {"router": f"{cluster.http_url}/metrics", **{name: cluster.metrics_url(name) for name in WORKERS}}


def value(text: str, name: str) -> float:
    return sum(float(v) for v in re.findall(rf"^{name}(?:{{.*}})? ([\d.e+-]+)$", text, re.MULTILINE))


async def used(client: httpx.AsyncClient, cluster: RunningCluster) -> dict[str, Use]:
    uses = {}
    for name, url in metrics_urls(cluster).items():
        text = (await client.get(url)).text
        names = ("process_resident_memory_bytes", "process_open_fds", "splitserve_asyncio_tasks")
        uses[name] = Use(*(value(text, each) for each in names))
    return uses


async def idle(client: httpx.AsyncClient, cluster: RunningCluster) -> None:
    names = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "kv_transfers_active")
    async with asyncio.timeout(15):
        for process in WORKERS:
            while any(
                [
                    value((await client.get(cluster.metrics_url(process))).text, f"splitserve_{name}")
                    for name in names
                ]
            ):
                await asyncio.sleep(0.1)


class Load:
    """Clients that ask, compare and, one time in three, leave."""

    def __init__(self, client: httpx.AsyncClient, expected: list[list[str]]) -> None:
        self._client = client
        self._expected = expected
        self.counts: Counter[str] = Counter()
        self.wrong: list[str] = []

    async def run(self, seed: int, until: float) -> None:
        draw, loop = random.Random(seed), asyncio.get_running_loop()
        while loop.time() < until:
            i = draw.randrange(REQUESTS)
            patience = draw.uniform(0, 0.4) if draw.random() < 0.33 else 60.0
            try:
                async with asyncio.timeout(patience):
                    texts = await ask(self._client, make_request(i))
            except TimeoutError:
                assert patience < 1, f"request {i} was not answered in {patience} s"
                self.counts["left"] += 1
                continue
            self.counts["answered"] += 1
            if texts != self._expected[i]:
                self.wrong.append(f"request {i}: {texts} instead of {self._expected[i]}")

    async def spread(self, seconds: float, seed: int) -> None:
        until = asyncio.get_running_loop().time() + seconds
        async with asyncio.TaskGroup() as group:
            for i in range(CLIENTS):
                group.create_task(self.run(seed * 1000 + i, until))


@pytest.mark.timeout(SECONDS + 240)
async def test_nothing_leaks_under_mixed_load(cluster: RunningCluster) -> None:
    limits = httpx.Limits(max_connections=4 * CLIENTS)
    async with httpx.AsyncClient(base_url=cluster.http_url, timeout=60, limits=limits) as client:
        expected = [await ask(client, make_request(i)) for i in range(REQUESTS)]
        load = Load(client, expected)
        await load.spread(SECONDS * WARM_UP, seed=1)
        await idle(client, cluster)
        before = await used(client, cluster)
        await load.spread(SECONDS * (1 - WARM_UP), seed=2)
        await idle(client, cluster)
        await asyncio.sleep(1)  # connections of those who left are closed by now
        after = await used(client, cluster)
        preempted = 0.0
        for name in WORKERS:
            preempted += value(
                (await client.get(cluster.metrics_url(name))).text, "splitserve_num_preemptions_total"
            )
    print(f"\n{SECONDS:.0f} s: {dict(load.counts)}, {preempted:.0f} preemptions")
    for name in before:
        print(f"{name:<10} before {before[name]}\n{'':<10} after  {after[name]}")
    assert not load.wrong, load.wrong[:3]
    assert load.counts["answered"] and load.counts["left"] and preempted
    for name, was in before.items():
        now = after[name]
        assert now.rss - was.rss < GROWTH_BYTES, name
        assert now.fds - was.fds <= GROWTH_FDS, name
        assert now.tasks - was.tasks <= GROWTH_TASKS, name
