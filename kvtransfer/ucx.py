"""The transport over UCX: shared memory, TCP, RDMA or NVLink, whatever the two ends have in common.

Endpoints use error handling, so UCX takes only lanes that survive the loss of a peer. Those do not write into a
stranger's memory by themselves (as process_vm_writev does), which a closed connection could not stop.

UCX has no authentication, and its listener takes every interface unless the host is loopback: the secret in the
handshake decides who may pull, and the network should be a private one.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any

from kvtransfer.faults import ConnectionLost
from kvtransfer.transport import Connection, Listener, Transport, split_address
from kvtransfer.ucx_connection import CLOSE_NS, UcxConnection
from kvtransfer.ucx_driver import UcxDriver, load_ucxx
from kvtransfer.ucx_loopback import confine
from splitserve.addresses import is_loopback

logger = logging.getLogger(__name__)

_GREETING_SECONDS = 2.0
_MAX_GREETERS = 64


class UcxListener(Listener):
    """Owns the UCX listener and the tasks that greet newcomers."""

    def __init__(self, driver: UcxDriver, host: str, on_connection: Callable[[Connection], None]) -> None:
        self._driver = driver
        self._on_connection = on_connection
        self._greeters: set[asyncio.Task[None]] = set()
        self._listener: Any = driver.ucx.UCXListener.create(
            worker=driver.worker, port=0, cb_func=self._accept, cb_args=(), deliver_endpoint=True
        )
        if is_loopback(host):
            confine(self._listener.port)
        self.address = f"[{host}]:{self._listener.port}" if ":" in host else f"{host}:{self._listener.port}"

    async def close(self) -> None:
        self._listener = None
        for task in list(self._greeters):
            task.cancel()
        await asyncio.gather(*self._greeters, return_exceptions=True)

    def _accept(self, endpoint: Any, *_: object) -> None:
        """Called by UCX while the driver makes progress, in the loop's thread."""
        if self._listener is None or len(self._greeters) >= _MAX_GREETERS:
            endpoint.close_blocking(period=CLOSE_NS, max_attempts=1)
            return
        connection = UcxConnection(self._driver, endpoint, f"{endpoint.handle:#x}")
        task = asyncio.get_running_loop().create_task(self._greet(connection))
        self._greeters.add(task)
        task.add_done_callback(self._greeters.discard)

    async def _greet(self, connection: UcxConnection) -> None:
        try:
            async with asyncio.timeout(_GREETING_SECONDS):
                await connection.greet()
        except (ConnectionLost, TimeoutError) as error:
            logger.info("a newcomer went away before it said anything: %s", error or "too slow")
            await connection.close()
        except asyncio.CancelledError:
            await connection.close()
            raise
        else:
            self._on_connection(connection)


class UcxTransport(Transport):
    """Makes its UCX worker at the first use, for the event loop that runs then."""

    name = "ucx"

    def __init__(self) -> None:
        """ConfigError if ucxx is not installed."""
        load_ucxx()
        self._driver: UcxDriver | None = None

    async def listen(self, host: str, on_connection: Callable[[Connection], None]) -> Listener:
        try:
            listener = UcxListener(self._running(), host, on_connection)
        except load_ucxx().UCXError as error:
            raise OSError(f"UCX cannot listen: {error}") from error
        if not is_loopback(host):
            port = listener.address.rpartition(":")[2]
            logger.info("UCX listens on every interface, port %s; the handshake's secret guards it", port)
        return listener

    async def connect(self, address: str) -> Connection:
        driver = self._running()
        try:
            host, port = split_address(address)
            loop = asyncio.get_running_loop()
            where = (await loop.getaddrinfo(host, port))[0][4][0]
            endpoint = driver.ucx.UCXEndpoint.create(driver.worker, str(where), port, True)
        except (ValueError, OSError, driver.ucx.UCXError) as error:
            raise ConnectionLost(str(error)) from error
        connection = UcxConnection(driver, endpoint, address)
        try:
            await connection.greet()
        except BaseException:
            await connection.close()
            raise
        return connection

    async def close(self) -> None:
        if self._driver is not None:
            self._driver.close()
            self._driver = None

    def _running(self) -> UcxDriver:
        if self._driver is None:
            self._driver = UcxDriver()
        return self._driver
