"""The gRPC server of every process: limits, health, reflection and errors, the same everywhere.

Owns the server and its port; knows no servicer. Invariant: health says SERVING for a service only between
``ready`` and ``not_ready``, and never once the server is stopping.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, Self

import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_health.v1.health import SERVICE_NAME as HEALTH
from grpc_reflection.v1alpha import reflection

from splitserve.api_keys import Keyring
from splitserve.config import TlsFiles
from splitserve.errors import ConfigError
from splitserve.grpc_auth import AuthInterceptor
from splitserve.grpc_errors import ErrorInterceptor, error_from_rpc
from splitserve.tls import channel_credentials, server_credentials

__all__ = ["GrpcServer", "check_health", "error_from_rpc", "open_channel"]

logger = logging.getLogger(__name__)

MAX_MESSAGE_BYTES = 16 * 1024 * 1024
KEEPALIVE_MS = 5_000  # with the timeout shorter than a transfer's lease: whoever is cut off is noticed first
KEEPALIVE_TIMEOUT_MS = 3_000

_COMMON_OPTIONS: tuple[tuple[str, Any], ...] = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.keepalive_time_ms", KEEPALIVE_MS),
    ("grpc.keepalive_timeout_ms", KEEPALIVE_TIMEOUT_MS),
    ("grpc.http2.max_pings_without_data", 0),
)
SERVER_OPTIONS: tuple[tuple[str, Any], ...] = (
    *_COMMON_OPTIONS,
    ("grpc.so_reuseport", 0),  # a port in use must be an error, not half of the connections
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_ping_interval_without_data_ms", KEEPALIVE_MS // 2),
)
CHANNEL_OPTIONS: tuple[tuple[str, Any], ...] = (
    *_COMMON_OPTIONS,
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 250),  # a worker that restarts at its address is asked within a second
    ("grpc.use_local_subchannel_pool", 1),  # a closed channel's backoff must not outlive it
)


def open_channel(address: str, tls: TlsFiles | None = None) -> grpc.aio.Channel:
    """A channel to a worker at ``host:port``, with the limits and keepalive that its server expects."""
    if tls is not None:
        return grpc.aio.secure_channel(address, channel_credentials(tls), options=CHANNEL_OPTIONS)
    return grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS)


class GrpcServer:
    """A server for ``services`` (full names, such as ``splitserve.v1.Worker``); port 0 picks a free one.

        async with GrpcServer(host, port, ["splitserve.v1.Worker"], register) as server:
            await server.ready("splitserve.v1.Worker")

    ``register`` adds the servicers to the ``grpc.aio.Server`` that it is given. Leaving the block refuses new
    calls and waits ``grace`` seconds for the open ones. Raises ConfigError when the port can't be bound.
    ``public``: what errors say of our insides is kept from the callers, who are not of the cluster.
    ``write_seconds``: a caller that takes no message of its stream for so long is given up.
    """

    def __init__(
        self,
        host: str,
        port: int,
        services: Sequence[str],
        register: Callable[[grpc.aio.Server], None],
        grace: float = 5.0,
        max_concurrent_rpcs: int | None = None,
        tls: TlsFiles | None = None,
        keyring: Keyring | None = None,
        public: bool = False,
        write_seconds: float | None = None,
    ) -> None:
        self._host = host
        self._port = port
        self._services = tuple(services)
        self._register = register
        self._grace = grace
        self._max_concurrent_rpcs = max_concurrent_rpcs
        self._tls = tls
        self._keyring = keyring or Keyring()
        self._public = public
        self._write_seconds = write_seconds
        self._health = health.aio.HealthServicer()
        self._ready: set[str] = set()
        self._server: grpc.aio.Server | None = None

    @property
    def port(self) -> int:
        """The port bound; the one asked for until ``start``."""
        return self._port

    @property
    def address(self) -> str:
        """``host:port`` as bound."""
        return _join(self._host, self._port)

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    async def start(self) -> int:
        """Binds and serves, every service NOT_SERVING until ``ready``. Returns the port."""
        assert self._server is None, "already started"
        _check_free(self._host, self._port)
        credentials = None if self._tls is None else server_credentials(self._tls)
        server = grpc.aio.server(
            interceptors=[AuthInterceptor(self._keyring), ErrorInterceptor(self._public, self._write_seconds)],
            options=SERVER_OPTIONS,
            maximum_concurrent_rpcs=self._max_concurrent_rpcs,
        )
        self._register(server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        reflection.enable_server_reflection((*self._services, HEALTH, reflection.SERVICE_NAME), server)
        for service in ("", *self._services):
            await self._health.set(service, health_pb2.HealthCheckResponse.NOT_SERVING)
        try:
            address = _join(self._host, self._port)
            port = (
                server.add_insecure_port(address)
                if credentials is None
                else server.add_secure_port(address, credentials)
            )
        except RuntimeError as error:
            await server.stop(None)
            raise ConfigError(f"cannot listen on {self.address}: is the port in use?") from error
        await server.start()
        self._server, self._port = server, port
        return port

    async def ready(self, *services: str) -> None:
        """Says SERVING for ``services`` (default: all), and for the server once all of its services are."""
        self._ready.update(services or self._services)
        await self._publish()

    async def not_ready(self, *services: str) -> None:
        """Says NOT_SERVING for ``services`` (default: all) and for the server."""
        self._ready.difference_update(services or self._services)
        await self._publish()

    async def stop(self, grace: float | None = None) -> None:
        """Refuses new calls, gives open ones ``grace`` seconds (default: the server's), cancels the rest."""
        if self._server is None:
            return
        server, self._server = self._server, None
        await self._health.enter_graceful_shutdown()
        await server.stop(self._grace if grace is None else grace)

    async def wait(self) -> None:
        """Returns when the server has ended."""
        assert self._server is not None, "not started"
        await self._server.wait_for_termination()

    async def _publish(self) -> None:
        serving, not_serving = (
            health_pb2.HealthCheckResponse.SERVING,
            health_pb2.HealthCheckResponse.NOT_SERVING,
        )
        for service in self._services:
            await self._health.set(service, serving if service in self._ready else not_serving)
        await self._health.set("", serving if self._ready.issuperset(self._services) else not_serving)


def _check_free(host: str, port: int) -> None:
    """Raises ConfigError when ``port`` can't be bound: gRPC would also say so, in its own words, on stderr."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        socket.create_server((host.strip("[]"), port), family=family).close()
    except OSError as error:
        raise ConfigError(f"cannot listen on {_join(host, port)}: {error.strerror}") from error


async def check_health(address: str, service: str = "", timeout: float = 2.0, tls: TlsFiles | None = None) -> bool:
    """Whether the server at ``address`` says SERVING for ``service``; False when it can't be reached."""
    async with open_channel(address, tls) as channel:
        request = health_pb2.HealthCheckRequest(service=service)
        try:
            async with asyncio.timeout(timeout):
                reply = await health_pb2_grpc.HealthStub(channel).Check(request, timeout=timeout)
        except (grpc.aio.AioRpcError, TimeoutError):
            return False
        return bool(reply.status == health_pb2.HealthCheckResponse.SERVING)


def _join(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host and not host.startswith("[") else f"{host}:{port}"
