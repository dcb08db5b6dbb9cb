"""``python -m router``: a router, as ``splitserve router`` starts it."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import socket

if __name__ == "__main__":
    gc.disable()  # imports leave next to nothing to find: on again when the router is ready

from router.catalog import Catalog
from router.cluster import ClusterBackend
from router.grpc_front import SERVICE, InferenceServicer
from router.http.app import create_app
from router.http.service import HttpConfig
from router.legs import Channels
from router.orchestrator import Orchestrator
from router.planner import Planner
from router.policy import PolicyConfig
from router.renderer import ProcessRenderer
from router.request_limit import RequestLimit
from router.retry_budget import RetryBudget
from router.snapshot import ClusterView
from router.vigil import Vigil
from splitserve.addresses import is_loopback
from splitserve.api_keys import Keyring
from splitserve.children import tell_ready
from splitserve.config import RouterConfig
from splitserve.directory import Directory
from splitserve.grpc_server import GrpcServer
from splitserve.http_server import HttpServer
from splitserve.logs import setup_logging
from splitserve.metrics import RouterMetrics, new_registry
from splitserve.process import run_process, stop_event
from splitserve.v1 import inference_pb2_grpc

log = logging.getLogger(__name__)

_HEALTH_SECONDS = 0.5


async def serve(config: RouterConfig) -> None:
    """Runs a router until SIGTERM or SIGINT, then lets open requests end within the drain timeout."""
    setup_logging("router", f"router-{socket.gethostname()}-{os.getpid()}", config.log.level, config.log.json)
    stopping = stop_event()
    registry = new_registry()
    metrics = RouterMetrics(registry)
    channels = Channels(config.tls)
    keyring = Keyring(config.api_keys)
    if not keyring and not is_loopback(config.host):
        log.warning("whoever reaches %s may use the API: give --api-key or --api-key-file", config.host)
    async with (
        Directory(config.redis_url, tls=config.tls) as directory,
        ClusterView(directory) as view,
        ProcessRenderer() as renderer,
    ):
        policy = PolicyConfig(
            decode_only_tokens=config.decode_only_tokens, max_first_token_seconds=config.ttft_slo
        )
        planner = Planner(directory, view, policy)
        orchestrator = Orchestrator(planner, view, channels, metrics, config.max_retries, RetryBudget())
        backend = ClusterBackend(
            view, Catalog(channels), channels, orchestrator, RequestLimit(config.max_concurrent_requests)
        )
        http_config = HttpConfig(request_seconds=config.request_timeout)
        app = create_app(backend, http_config, metrics, registry, keyring, renderer)
        servicer = InferenceServicer(backend, metrics, keyring, config.request_timeout)
        grpc_server = GrpcServer(
            config.host,
            config.grpc_port,
            [SERVICE],
            lambda server: inference_pb2_grpc.add_InferenceServicer_to_server(servicer, server),
            grace=config.drain_timeout,
            tls=config.public_tls,
            keyring=keyring,
            public=True,
            write_seconds=config.reader_timeout,
        )
        http_server = HttpServer(
            app, config.host, config.port, config.drain_timeout, config.public_tls, config.reader_timeout
        )
        try:
            async with asyncio.TaskGroup() as tasks, grpc_server, http_server:
                watching = [
                    tasks.create_task(backend.follow()),
                    tasks.create_task(Vigil(channels, config.worker_timeout).keep()),
                    tasks.create_task(_tell_health(backend, grpc_server)),
                ]
                gc.freeze()  # a full collection that walks all modules holds every stream up for 20 to 50 ms
                gc.enable()
                tell_ready(config.ready_fd, {"http": http_server.url, "grpc": grpc_server.address})
                log.info("ready", extra={"http": http_server.url, "grpc": grpc_server.address})
                await stopping.wait()
                log.info("draining", extra={"timeout": config.drain_timeout})
                backend.drain()
                await asyncio.gather(grpc_server.stop(), http_server.close())
                for task in watching:
                    task.cancel()
        finally:
            await channels.close()
    log.info("stopped")


async def _tell_health(backend: ClusterBackend, server: GrpcServer) -> None:
    """gRPC health says what /ready says, a little later."""
    while True:
        await (server.not_ready() if backend.readiness() else server.ready())
        await asyncio.sleep(_HEALTH_SECONDS)


if __name__ == "__main__":
    run_process(RouterConfig, serve)
