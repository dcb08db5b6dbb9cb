"""Clusters of real processes: Redis, router, prefill and decode workers, on free ports of loopback."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from splitserve.cluster import Role
from splitserve.config import LogConfig, RouterConfig, WorkerConfig
from splitserve.local import ClusterSpec, LocalCluster, divide_cores
from tests.tiny_models import make_tiny

POOL = 256 << 20


def worker(role: Role, model: str, name: str, **options: Any) -> WorkerConfig:
    """A worker in float32, so that answers can be compared token by token."""
    settings = {
        "dtype": "float32",
        "kv_cache_memory": POOL,
        "drain_timeout": 5.0,
        "log": LogConfig("info"),
        **options,
    }
    return WorkerConfig(role, model, redis_url="", worker_id=name, **settings)


def pair(model: str, prefix: str = "", **options: Any) -> list[WorkerConfig]:
    """One worker of each role, with a core each."""
    roles = (Role.PREFILL, Role.DECODE)
    return [
        worker(role, model, f"{prefix}{role}-0", cores=cores, **options)
        for role, cores in zip(roles, divide_cores(2), strict=True)
    ]


class RunningCluster:
    """A cluster and the loop that its processes are watched from."""

    def __init__(self, cluster: LocalCluster, runner: asyncio.Runner) -> None:
        self.cluster = cluster
        self._runner = runner

    @property
    def http_url(self) -> str:
        return self.cluster.http_url

    @property
    def grpc_address(self) -> str:
        return self.cluster.grpc_address

    @property
    def redis_url(self) -> str:
        return self.cluster.redis_url

    def metrics_url(self, name: str) -> str:
        return self.cluster.children[name].addresses["metrics"] + "/metrics"

    def add(self, name: str, config: WorkerConfig) -> None:
        self._runner.run(self.cluster.add(name, config))

    def stop(self, name: str) -> int:
        return self._runner.run(self.cluster.children.pop(name).stop())


@contextmanager
def running(workers: list[WorkerConfig], directory: Path, **router: Any) -> Iterator[RunningCluster]:
    """Asserts at the end that every process drained: exit code 0 means that its engine's books were in order."""
    config = RouterConfig(redis_url="", port=0, grpc_port=0, drain_timeout=5.0, log=LogConfig("info"), **router)
    cluster = LocalCluster(ClusterSpec(config, tuple(workers), directory, directory))
    with asyncio.Runner() as runner:
        runner.run(cluster.__aenter__())
        try:
            yield RunningCluster(cluster, runner)
        finally:
            codes = runner.run(cluster.close())
    assert set(codes.values()) <= {0}, codes


@pytest.fixture(scope="session")
def demo_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningCluster]:
    """The demo model on one prefill and one decode worker."""
    with running(pair("smollm2"), tmp_path_factory.mktemp("demo")) as cluster:
        yield cluster


@pytest.fixture(scope="session")
def tiny_path(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    directory = tmp_path_factory.mktemp("models")
    return lambda family="llama", seed=0: str(make_tiny(directory, family, seed))


@pytest.fixture(scope="session")
def tiny_cluster(
    tmp_path_factory: pytest.TempPathFactory, tiny_path: Callable[..., str]
) -> Iterator[RunningCluster]:
    """A tiny model, served as ``tiny``, on one prefill and one decode worker."""
    workers = pair(tiny_path(), served_model_name="tiny", kv_cache_memory=8 << 20)
    with running(workers, tmp_path_factory.mktemp("tiny"), decode_only_tokens=16) as cluster:
        yield cluster
