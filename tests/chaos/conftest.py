"""One cluster for all scenarios, whole again after each of them."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path

import grpc.aio
import pytest
import pytest_asyncio

from tests.chaos.cluster import SECONDS, ChaosCluster, chaos_cluster
from tests.chaos.load import Oracle, cases
from tests.chaos.nursery import Nursery
from tests.tiny_models import make_tiny

CONTEXT = 4096  # tokens: long answers give time to break something in the middle


def long_tiny(directory: Path) -> str:
    """A tiny model with a long context."""
    path = make_tiny(directory)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"max_position_embeddings": CONTEXT}))
    return str(path)


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def nursery() -> AsyncIterator[Nursery]:
    """Where all processes of all clusters come from."""
    async with Nursery() as nursery:
        yield nursery


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def _session_cluster(
    tmp_path_factory: pytest.TempPathFactory, nursery: Nursery
) -> AsyncIterator[ChaosCluster]:
    directory = tmp_path_factory.mktemp("chaos")
    async with chaos_cluster(directory, long_tiny(directory), nursery) as cluster:
        yield cluster


@pytest_asyncio.fixture(loop_scope="session")
async def cluster(_session_cluster: ChaosCluster) -> AsyncIterator[ChaosCluster]:
    """1 router, 2 prefill and 2 decode workers of a tiny model, all idle."""
    yield _session_cluster
    await _session_cluster.heal()


@pytest_asyncio.fixture(loop_scope="session")
async def channel(cluster: ChaosCluster) -> AsyncIterator[grpc.aio.Channel]:
    """To the router."""
    async with cluster.channel() as channel:
        yield channel


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def oracle(_session_cluster: ChaosCluster) -> Oracle:
    """Requests and their answers in an undisturbed run."""
    oracle = Oracle(cases(200 if SECONDS else 40))
    async with _session_cluster.channel() as channel:
        await oracle.learn(channel)
    return oracle
