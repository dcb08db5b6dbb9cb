"""The life of a worker process, whatever its role: load, join, serve, drain, leave.

Owns the order of these steps, the ports, the agent that speaks to the directory, and the export of the engine's
numbers. Knows an engine only by the `WorkerEngine` protocol, and a role only by `WorkerRole`.
Invariant: health and directory say ready only while requests are accepted.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import socket
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar

import grpc.aio
from prometheus_client import CollectorRegistry

import splitserve
from splitserve.addresses import advertised_host, is_loopback, join
from splitserve.agent import WorkerAgent
from splitserve.api_keys import Keyring
from splitserve.children import tell_ready
from splitserve.cluster import Role, WorkerInfo, WorkerLoad
from splitserve.config import WorkerConfig
from splitserve.directory import Directory
from splitserve.errors import Unavailable
from splitserve.grpc_server import GrpcServer
from splitserve.hashing import BlockHash
from splitserve.logs import setup_logging
from splitserve.metrics import EngineMetrics, new_registry
from splitserve.metrics_server import MetricsServer
from splitserve.model_info import ModelDescription, description_to_proto
from splitserve.partners import Partners
from splitserve.process import stop_event
from splitserve.v1 import worker_pb2, worker_pb2_grpc

log = logging.getLogger(__name__)

WORKER_SERVICE = "splitserve.v1.Worker"
_GAUGE_SECONDS = 0.5


class Stats(Protocol):
    """Counters of an engine that only grow."""

    prompt_tokens: int
    cached_tokens: int
    preemptions: int


class WorkerEngine(Protocol):
    """What the process needs of its engine."""

    @property
    def stats(self) -> Stats: ...
    @property
    def num_blocks(self) -> int: ...
    @property
    def block_bytes(self) -> int: ...
    @property
    def step_seconds(self) -> float: ...
    def let_go(self) -> None: ...
    async def start(self) -> None: ...
    async def close(self) -> None: ...
    def load(self) -> WorkerLoad: ...
    def take_block_events(self) -> tuple[list[BlockHash], list[BlockHash]]: ...
    def known_hashes(self) -> list[BlockHash]: ...


class WorkerRole(Protocol):
    """What a role adds: its servicer and its side of the transfers."""

    service: str  # full name of its gRPC service

    def register(self, server: grpc.aio.Server) -> None:
        """Adds the servicer."""
        ...

    async def start(self) -> Mapping[str, str]:
        """Opens its side of the transfers; addresses by transport name, empty if it only pulls."""
        ...

    def join(self, agent: WorkerAgent) -> None:
        """The directory knows this incarnation; requests may come now."""
        ...

    def complete(self, load: WorkerLoad) -> WorkerLoad:
        """The engine's load with what the role's transfers have measured."""
        ...

    async def close(self) -> None: ...


class InfoServicer(worker_pb2_grpc.WorkerServicer):
    """Tells routers about the model."""

    def __init__(self, description: ModelDescription) -> None:
        self._message = description_to_proto(description)

    async def GetModel(
        self, request: worker_pb2.GetModelRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> worker_pb2.ModelInfo:
        return self._message


_Engine = TypeVar("_Engine", bound=WorkerEngine)


@dataclass(frozen=True, slots=True)
class WorkerContext:
    """What a role is made with. ``config.worker_id`` and ``config.advertise_host`` are set."""

    config: WorkerConfig
    description: ModelDescription
    registry: CollectorRegistry
    metrics: EngineMetrics


async def run_worker(
    config: WorkerConfig,
    load: Callable[[WorkerConfig], tuple[_Engine, ModelDescription]],
    make_role: Callable[[WorkerContext, _Engine], WorkerRole],
) -> None:
    """Runs a worker until SIGTERM or SIGINT, then drains it. ``load`` reads the model and warms it up; it runs in
    a thread. Raises ConfigError when the worker can't start, Unavailable when another one has taken its place,
    EngineError when its engine has failed."""
    worker_id = config.worker_id or f"{config.role}-{socket.gethostname()}-{os.getpid()}"
    config = replace(config, worker_id=worker_id)
    setup_logging(config.role, worker_id, config.log.level, config.log.json)
    if config.tls is None and not is_loopback(config.host):
        log.warning(
            "whoever reaches %s may use this worker: keep it on a private network, or give --tls-*", config.host
        )
    stopping = stop_event()
    registry = new_registry()
    readiness = Readiness()
    async with (
        Directory(config.redis_url, config.lease_seconds, tls=config.tls) as directory,
        MetricsServer(
            registry,
            lambda: readiness.reasons + readiness.not_live,
            config.host,
            config.metrics_port,
            lambda: readiness.not_live,
            Keyring(config.api_keys),
            config.tls,
        ) as metrics_server,
    ):
        reachable = await advertised_host(config.host, config.advertise_host, config.redis_url)
        config = replace(config, advertise_host=reachable)
        engine, description = await asyncio.to_thread(load, config)
        gc.enable()  # off while the process started
        metrics = EngineMetrics(registry, description.model, config.role)
        role = make_role(WorkerContext(config, description, registry, metrics), engine)
        await engine.start()
        try:
            server = GrpcServer(
                config.host,
                config.port,
                [role.service, WORKER_SERVICE],
                lambda s: _register(s, role, description),
                grace=config.drain_timeout,
                tls=config.tls,
            )
            async with server:
                info = _info(config, description, engine, server.port, await role.start())
                agent = WorkerAgent(
                    directory,
                    info,
                    lambda: role.complete(engine.load()),
                    engine.take_block_events,
                    engine.known_hashes,
                )
                async with agent:
                    role.join(agent)
                    readiness.reasons.clear()
                    await readiness.say(server)
                    tell_ready(config.ready_fd, {"grpc": info.grpc_address, "metrics": metrics_server.url})
                    log.info("ready", extra={"grpc": info.grpc_address, "metrics": metrics_server.url})
                    looks = (
                        Watchdog(engine, agent, config.step_timeout, readiness.not_live).look,
                        Partners(directory, info, readiness.reasons).look,
                        lambda: readiness.say(server),
                    )
                    await _watch_until(stopping, engine, metrics, agent, looks)
                    await _drain(config, server, agent, readiness)
        finally:
            await role.close()
            await engine.close()  # checks its books: a leaked block shows as a failed process
    log.info("stopped")


async def _drain(config: WorkerConfig, server: GrpcServer, agent: WorkerAgent, readiness: Readiness) -> None:
    """Ends what is open, in time. Raises Unavailable if another process has taken this one's place."""
    readiness.reasons.append("draining")
    log.info("draining", extra={"timeout": config.drain_timeout})
    await readiness.say(server)
    agent.set_draining()
    await server.stop()
    if agent.ended:
        await agent.wait()  # raises what broke it
        raise Unavailable(f"another process has registered worker id {config.worker_id}")


def _info(
    config: WorkerConfig,
    description: ModelDescription,
    engine: WorkerEngine,
    port: int,
    transfer_addresses: Mapping[str, str],
) -> WorkerInfo:
    """What the directory will say of this worker."""
    assert config.worker_id is not None and config.advertise_host is not None
    return WorkerInfo(
        id=config.worker_id,
        role=config.role,
        model=description.model,
        fingerprint=description.fingerprint,
        grpc_address=join(config.advertise_host, port),
        block_tokens=description.block_tokens,
        block_bytes=engine.block_bytes,
        num_blocks=engine.num_blocks,
        max_num_seqs=config.max_num_seqs,
        max_model_len=description.max_model_len,
        transfer_addresses=transfer_addresses,
        pid=os.getpid(),
        version=splitserve.__version__,
    )


def _register(server: grpc.aio.Server, role: WorkerRole, description: ModelDescription) -> None:
    role.register(server)
    worker_pb2_grpc.add_WorkerServicer_to_server(InfoServicer(description), server)


class Readiness:
    """Why this process is not ready, and why not even live. /live and /ready read the lists, gRPC is told."""

    def __init__(self) -> None:
        self.reasons = ["the model is being loaded"]
        self.not_live: list[str] = []
        self._said = False

    async def say(self, server: GrpcServer) -> None:
        """Tells gRPC health if it is no longer what it was told last."""
        ready = not (self.reasons or self.not_live)
        if ready != self._said:
            self._said = ready
            await (server.ready() if ready else server.not_ready())


class Watchdog:
    """Takes a worker out of service while a step of its engine does not end, and back when it has."""

    def __init__(self, engine: WorkerEngine, agent: WorkerAgent, seconds: float, not_live: list[str]) -> None:
        self._engine = engine
        self._agent = agent
        self._seconds = seconds
        self._not_live = not_live  # filled here

    async def look(self) -> None:
        stuck = self._engine.step_seconds > self._seconds
        if stuck:
            self._engine.let_go()
        if stuck == bool(self._not_live):
            return
        self._agent.set_draining(stuck)
        if stuck:
            self._not_live.append(f"no step has ended for {self._seconds:g} s")
            log.critical("the engine makes no progress: %s", self._not_live[0])
        else:
            self._not_live.clear()
            log.warning("the engine makes progress again")


async def _watch_until(
    stopping: asyncio.Event,
    engine: WorkerEngine,
    metrics: EngineMetrics,
    agent: WorkerAgent,
    looks: Sequence[Callable[[], Awaitable[None]]],
) -> None:
    """Takes each of the ``looks`` twice a second and copies the engine's counts into the metrics, until it is time
    to stop or the agent has ended. Raises EngineError when the engine has failed."""

    def load() -> tuple[int, int, float]:
        now = engine.load()
        return now.num_running, now.num_waiting, now.used_blocks / engine.num_blocks

    metrics.follow_load(load)
    prompt = cached = preemptions = 0
    while not stopping.is_set() and not agent.ended:
        for look in looks:
            await look()
        engine.load()  # raises if its thread has failed
        stats = engine.stats
        metrics.add_prefix_lookup(stats.prompt_tokens - prompt, stats.cached_tokens - cached)
        metrics.add_preemptions(stats.preemptions - preemptions)
        prompt, cached, preemptions = stats.prompt_tokens, stats.cached_tokens, stats.preemptions
        with suppress(TimeoutError):
            async with asyncio.timeout(_GAUGE_SECONDS):
                await stopping.wait()


def deadline_of(context: grpc.aio.ServicerContext[Any, Any]) -> float | None:
    """When the caller's time is over, in monotonic time."""
    remaining = context.time_remaining()
    return None if remaining is None else time.monotonic() + remaining


def not_joined(role: Role) -> Unavailable:
    """What a servicer answers before `WorkerRole.join`."""
    return Unavailable(f"this {role} worker has not joined the cluster yet")
