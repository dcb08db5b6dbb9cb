"""A cluster of real processes that a test may kill, stop, continue and restart, behind a Redis that may fail."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import grpc.aio
import httpx

from splitserve.children import Child
from splitserve.cluster import Role
from splitserve.config import LogConfig, RouterConfig, WorkerConfig
from splitserve.grpc_server import open_channel
from splitserve.local import divide_cores
from splitserve.redis_server import PrivateRedis
from splitserve.v1 import inference_pb2, inference_pb2_grpc
from tests.chaos.faulty_worker import Fault, arm, link_file, owned_file, poison_file, relayed_file
from tests.chaos.nursery import Nursery, NurseryChild
from tests.chaos.proxy import FaultProxy, Streams
from tests.chaos.sick_engine import calls, failing_file, pace_file

SECONDS = float(os.environ.get("SPLITSERVE_CHAOS_SECONDS", "0"))  # of the soak; not 0: all scenarios are long
READY_SECONDS = 90.0
STEP_TIMEOUT = 1.5
DRAIN_TIMEOUT = 4.0
BLOCK_BYTES = 16 * 2 * 2 * 2 * 16 * 4  # of the tiny model: tokens x heads x layers x K and V x head size x float32
_BUSY = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "kv_transfers_active")


@dataclass(frozen=True, slots=True)
class Use:
    """What a process has in use."""

    rss: float  # bytes
    fds: float
    tasks: float


class ChaosCluster:
    """Made by `chaos_cluster`. Addresses stay what they are across restarts."""

    def __init__(
        self, directory: Path, model: str, redis: PrivateRedis, link: FaultProxy, nursery: Nursery
    ) -> None:
        self.redis = redis
        self.redis_link = link  # between Redis and everybody else
        self.children: dict[str, Child] = {}
        self._directory = directory
        self._model = model
        self._nursery = nursery
        self._http = httpx.AsyncClient(timeout=10.0)

    # -- who there is --------------------------------------------------------------------------------------

    @property
    def workers(self) -> list[str]:
        return [name for name, child in self.children.items() if isinstance(child.config, WorkerConfig)]

    @property
    def http_url(self) -> str:
        return self.children["router"].addresses["http"]

    @property
    def grpc_address(self) -> str:
        return self.children["router"].addresses["grpc"]

    def channel(self) -> grpc.aio.Channel:
        return open_channel(self.grpc_address)

    def log(self, name: str) -> str:
        path = self.children[name].log_path
        assert path is not None
        return path.read_text()

    # -- faults --------------------------------------------------------------------------------------------

    def arm(self, target: str, point: str, at: int, action: str) -> Path:
        """A worker, or the first one of a role, breaks itself at a named point; the file is gone when it has."""
        return arm(self._model, target, Fault(point, at, action))

    def poison(self, prompt: list[int]) -> None:
        """Until `cure`, a prompt that begins like this kills every worker that computes it."""
        poison_file(self._model).write_text(json.dumps(prompt))

    def cure(self) -> None:
        poison_file(self._model).unlink(missing_ok=True)

    def relay(self, worker: str, link: FaultProxy) -> None:
        """From its next start, others reach the worker's blocks through ``link`` only, until `direct`."""
        link_file(self._model, worker).write_text(link.address)

    async def relayed(self, worker: str) -> Streams:
        """What such a link leads to."""
        host, _, port = relayed_file(self._model, worker).read_text().rpartition(":")
        return await asyncio.open_connection(host, int(port))

    def direct(self, worker: str) -> None:
        link_file(self._model, worker).unlink()

    @contextmanager
    def paced(self, seconds: float) -> Iterator[None]:
        """Each step of each worker takes at least so long, without using the processor."""
        pace_file(self._model).write_text(str(seconds))
        try:
            yield
        finally:
            pace_file(self._model).unlink()

    @contextmanager
    def failing(self) -> Iterator[None]:
        """No step of any worker can be computed."""
        failing_file(self._model).touch()
        try:
            yield
        finally:
            failing_file(self._model).unlink()

    def calls(self) -> Counter[str]:
        """Requests that have come to the engines: ``p`` to be read for another worker, ``d`` to be answered."""
        return calls(self._model)

    def signal(self, name: str, number: signal.Signals) -> None:
        self.children[name].signal(number)

    async def kill(self, name: str) -> None:
        self.signal(name, signal.SIGKILL)
        assert await self.ended(name) == -signal.SIGKILL

    async def ended(self, name: str, seconds: float = 20.0) -> int:
        """Waits for the end of a process; its exit code."""
        async with asyncio.timeout(seconds):
            return await self.children[name].wait()

    def dead(self) -> list[str]:
        """Processes that have ended."""
        return [name for name, child in self.children.items() if child.returncode is not None]

    async def one_died(self) -> str:
        """Waits until a process has ended; its name."""
        async with asyncio.timeout(20):
            while not (dead := self.dead()):
                await asyncio.sleep(0.01)
        [name] = dead
        return name

    async def terminate(self, name: str) -> int:
        return await self.children[name].stop()

    async def start(
        self,
        name: str,
        config: WorkerConfig | RouterConfig,
        module: str | None = None,
        make: Callable[..., Child] = NurseryChild,
    ) -> None:
        child = make(name, config, self._directory, module)
        if isinstance(child, NurseryChild):
            child.nursery = self._nursery
        await child.start()
        if name in self.children:
            child.addresses = self.children[name].addresses  # should it never get ready
        self.children[name] = child
        await child.ready(READY_SECONDS)

    async def restart(self, name: str, **changes: Any) -> None:
        """A new process with the same name, at the same addresses, in place of one that has ended."""
        old = self.children[name]
        assert old.returncode is not None and old.addresses, f"{name} has not ended, or was never ready"
        ports = {kind: int(address.rpartition(":")[2]) for kind, address in old.addresses.items()}
        config: WorkerConfig | RouterConfig
        if isinstance(old.config, WorkerConfig):
            config = replace(old.config, port=ports["grpc"], metrics_port=ports["metrics"])
        else:
            config = replace(old.config, port=ports["http"], grpc_port=ports["grpc"])
        await self.start(name, replace(config, **changes), old.module)

    # -- what can be seen ----------------------------------------------------------------------------------

    async def metric(self, process: str, name: str, labels: str = "") -> float:
        """Sum over all series whose labels contain ``labels``."""
        addresses = self.children[process].addresses
        text = (await self._http.get(addresses.get("metrics", addresses.get("http", "")) + "/metrics")).text
        found = re.findall(rf"^{name}({{.*}})? ([\d.e+-]+)$", text, re.MULTILINE)
        return sum(float(value) for series, value in found if labels in series)

    async def retries(self, leg: str = "") -> float:
        return await self.metric("router", "splitserve_request_retries_total", leg)

    async def used(self, process: str) -> Use:
        names = ("process_resident_memory_bytes", "process_open_fds", "splitserve_asyncio_tasks")
        return Use(*[await self.metric(process, name) for name in names])

    def planned(self, worker: str) -> list[str]:
        """Ids of the requests that the router has given to ``worker``, once for each attempt, in order."""
        return re.findall(rf"planned  request_id=(\w+)\S* .*_worker={worker}\b", self.log("router"))

    def last_planned(self, role: str) -> str:
        """The worker that got the latest request."""
        return re.findall(rf"planned .*{role}_worker=(\S+)", self.log("router"))[-1]

    async def owned(self, worker: str, seconds: float = 20.0) -> set[bytes]:
        """The blocks that a worker itself says that it can offer now."""
        path = owned_file(self._model, worker)
        path.unlink(missing_ok=True)
        self.signal(worker, signal.SIGUSR1)
        async with asyncio.timeout(seconds):
            while not path.exists():
                await asyncio.sleep(0.01)
        return {bytes.fromhex(line) for line in path.read_text().split()}

    async def status(self, process: str, path: str) -> int:
        addresses = self.children[process].addresses
        return (await self._http.get(addresses.get("metrics", addresses.get("http", "")) + path)).status_code

    async def idle(self, seconds: float = 15.0) -> None:
        """No worker holds a block, a request or a transfer."""
        async with asyncio.timeout(seconds):
            for name in self.workers:
                while any([await self.metric(name, f"splitserve_{each}") for each in _BUSY]):
                    await asyncio.sleep(0.05)

    async def seen(self, seconds: float = 20.0) -> None:
        """The router knows all workers."""
        async with asyncio.timeout(seconds), self.channel() as channel:
            stub = inference_pb2_grpc.InferenceStub(channel)
            while True:
                reply = await stub.ListModels(inference_pb2.ListModelsRequest(), timeout=5)
                if sum(m.prefill_workers + m.decode_workers for m in reply.models) >= len(self.workers):
                    return
                await asyncio.sleep(0.05)

    async def heal(self) -> None:
        """Everything as at the start, whatever a test has done."""
        self.redis_link.heal()
        self.cure()
        for fault in Path(self._model).parent.glob("*.fault"):
            fault.unlink()
        for child in self.children.values():
            child.signal(signal.SIGCONT)
        await asyncio.gather(*(self.restart(name) for name in self.dead()))
        await self.seen()
        await self.idle()

    async def close(self) -> dict[str, int]:
        """Drains everything; exit codes by process."""
        await self._http.aclose()
        router = {name: child for name, child in self.children.items() if name not in self.workers}
        codes = {name: await child.stop() for name, child in router.items()}
        stops = await asyncio.gather(*(self.children[name].stop() for name in self.workers))
        return codes | dict(zip(self.workers, stops, strict=True))


@asynccontextmanager
async def chaos_cluster(
    directory: Path,
    model: str,
    nursery: Nursery,
    *,
    prefill: int = 2,
    decode: int = 2,
    host: str = "127.0.0.1",
    router: dict[str, Any] | None = None,
    **worker: Any,
) -> AsyncIterator[ChaosCluster]:
    """Asserts at the end that every process drained: exit code 0 means that its engine's books were in order."""
    async with AsyncExitStack() as stack:
        redis = PrivateRedis(directory)
        await stack.enter_async_context(redis)
        link = FaultProxy(lambda: asyncio.open_unix_connection(redis.socket), host)
        await stack.enter_async_context(link)
        url = f"redis://{link.address}"
        cluster = ChaosCluster(directory, model, redis, link, nursery)
        options: dict[str, Any] = {
            "host": host,
            "served_model_name": "tiny",
            "dtype": "float32",
            "kv_cache_memory": 2000 * BLOCK_BYTES,
            "max_num_batched_tokens": 64,
            "drain_timeout": DRAIN_TIMEOUT,
            "step_timeout": STEP_TIMEOUT,
            **worker,
        }
        names = [f"prefill-{i}" for i in range(prefill)] + [f"decode-{i}" for i in range(decode)]
        settings = {"decode_only_tokens": 16, "drain_timeout": DRAIN_TIMEOUT, **(router or {})}
        try:
            async with asyncio.TaskGroup() as group:
                for name, cores in zip(names, divide_cores(len(names)), strict=True):
                    role = Role(name.partition("-")[0])
                    config = WorkerConfig(
                        role, model, url, worker_id=name, cores=cores, log=LogConfig("info"), **options
                    )
                    group.create_task(cluster.start(name, config, "tests.chaos.faulty_worker"))
                front = RouterConfig(url, port=0, grpc_port=0, log=LogConfig("info"), **settings)
                group.create_task(cluster.start("router", front))
            await cluster.seen()
            yield cluster
            await cluster.heal()
        finally:
            codes = await cluster.close()
    assert set(codes.values()) <= {0}, codes
