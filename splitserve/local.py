"""A whole cluster on this machine: Redis if none is given, workers with their own cores, a router.

Owns the order of start and end. Knows nothing of models or requests. Invariant: whatever fails, every process
that was started has ended when the block is left, router first, Redis last.
"""

from __future__ import annotations

import asyncio
import itertools
import os
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Self

import httpx

from splitserve.api_keys import ApiKey, new_key
from splitserve.children import Child
from splitserve.config import RouterConfig, WorkerConfig
from splitserve.redis_server import PrivateRedis
from splitserve.shared_cores import create_table, spare_cores

START_SECONDS = 600.0  # a large model takes long to read
SEEN_SECONDS = 10.0

Report = Callable[[str, str], None]  # (process, what happened)


@dataclass(frozen=True, slots=True)
class ClusterSpec:
    """What to start. An empty ``redis_url`` in the configurations means: the private Redis."""

    router: RouterConfig
    workers: tuple[WorkerConfig, ...]
    run_dir: Path  # sockets
    log_dir: Path | None = None  # None: the children write to this process's stderr
    lend_cores: bool = True  # workers that have cores of their own compute on those of idle ones, too


class LocalCluster:
    """``async with LocalCluster(spec) as cluster``: ready inside, drained and gone outside."""

    def __init__(self, spec: ClusterSpec, report: Report | None = None) -> None:
        self._spec = spec
        self._key = new_key()  # to ask the router ourselves, where it asks for keys
        self._report = report or (lambda process, text: None)
        self._stack = AsyncExitStack()
        self.redis: PrivateRedis | None = None
        self.redis_url = spec.router.redis_url
        self.children: dict[str, Child] = {}

    @property
    def router(self) -> Child:
        return self.children["router"]

    @property
    def http_url(self) -> str:
        return self.router.addresses["http"]

    @property
    def grpc_address(self) -> str:
        return self.router.addresses["grpc"]

    async def __aenter__(self) -> Self:
        try:
            if not self.redis_url:
                self.redis = PrivateRedis(self._spec.run_dir)
                self.redis_url = await self._stack.enter_async_context(self.redis)
                self._report("redis", "ready")
            workers = self._share_cores()
            await asyncio.gather(*(self._start(c.worker_id or c.role, c) for c in workers))
            router = self._spec.router
            if router.api_keys:
                own = ApiKey.of(self._key, "splitserve-up")
                router = replace(router, api_keys=(*router.api_keys, own))
            await self._start("router", router)
            names = list(self.children)
            await asyncio.gather(*(self._ready(self.children[name]) for name in names))
            await self._seen(len(self.children) - 1)
        except BaseException:
            await self.close()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def add(self, name: str, config: WorkerConfig) -> Child:
        """One more worker, ready on return."""
        await self._start(name, config)
        await self._ready(self.children[name])
        await self._seen(len(self.children) - 1)
        return self.children[name]

    async def close(self) -> dict[str, int]:
        """Drains the router, then the workers; exit codes by process."""
        codes: dict[str, int] = {}
        router = self.children.pop("router", None)
        if router is not None:
            codes["router"] = await self._stop(router)
        workers = list(self.children.values())
        self.children.clear()
        codes |= zip(
            (w.name for w in workers), await asyncio.gather(*(self._stop(w) for w in workers)), strict=True
        )
        await self._stack.aclose()
        return codes

    async def first_to_end(self) -> tuple[str, int]:
        """Waits until any process ends by itself; its name and exit code."""
        waits = {asyncio.ensure_future(child.wait()): name for name, child in self.children.items()}
        if self.redis is not None:
            waits[asyncio.ensure_future(self.redis.wait())] = "redis"
        try:
            done, _pending = await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in waits:
                task.cancel()
        first = done.pop()
        return waits[first], first.result()

    def _share_cores(self) -> list[WorkerConfig]:
        """The workers, each with the others' cores as spare ones."""
        workers, table = self._spec.workers, self._spec.run_dir / "cores"
        spare = spare_cores([worker.cores for worker in workers])
        if not (self._spec.lend_cores and any(spare)):
            return list(workers)
        create_table(table, [core for worker in workers for core in worker.cores])
        return [
            replace(worker, spare_cores=cores, core_table=str(table))
            for worker, cores in zip(workers, spare, strict=True)
        ]

    async def _start(self, name: str, config: WorkerConfig | RouterConfig) -> None:
        child = Child(name, replace(config, redis_url=config.redis_url or self.redis_url), self._spec.log_dir)
        await child.start()
        self.children[name] = child
        self._report(name, f"started, process {child.pid}")

    async def _ready(self, child: Child) -> None:
        addresses = await child.ready(START_SECONDS)
        self._report(child.name, "ready at " + ", ".join(f"{k} {v}" for k, v in addresses.items()))

    async def _seen(self, num_workers: int) -> None:
        """Waits until the router knows so many workers. Our own child may show any certificate."""
        async with (
            asyncio.timeout(SEEN_SECONDS),
            httpx.AsyncClient(
                base_url=self.http_url,
                headers={"Authorization": f"Bearer {self._key}"},
                timeout=SEEN_SECONDS,
                verify=False,  # noqa: S501
                trust_env=False,
            ) as client,
        ):
            while True:
                models = (await client.get("/v1/models")).raise_for_status().json()["data"]
                if sum(m["prefill_workers"] + m["decode_workers"] for m in models) >= num_workers:
                    return
                await asyncio.sleep(0.05)

    async def _stop(self, child: Child) -> int:
        code = await child.stop()
        self._report(child.name, f"ended with exit code {code}")
        return code


def divide_cores(num_workers: int, available: Sequence[int] | None = None) -> list[tuple[int, ...]]:
    """Cores for each worker: disjoint while there are enough, else one each in turn."""
    cores = sorted(os.sched_getaffinity(0) if available is None else available)
    if num_workers > len(cores):
        return [(cores[i % len(cores)],) for i in range(num_workers)]
    bounds = [round(i * len(cores) / num_workers) for i in range(num_workers + 1)]
    return [tuple(cores[a:b]) for a, b in itertools.pairwise(bounds)]
