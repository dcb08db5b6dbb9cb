"""The source's side: publishes transfers, listens on every transport, ends leases.

Knows blocks and bytes, no requests. Blocks belong to their owner; a publication tells it when they are free.
Invariant: a transfer is found by its id exactly as long as it is not released.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Sequence
from dataclasses import replace

from kvtransfer.blocks import Blocks
from kvtransfer.frames import pack_worker_id
from kvtransfer.handle import KvHandle
from kvtransfer.observer import NullObserver, TransferObserver
from kvtransfer.publication import Publication, ReleaseReason
from kvtransfer.session import Session, SourceIdentity
from kvtransfer.tasks import uninterrupted
from kvtransfer.transport import Connection, Listener, Transport

logger = logging.getLogger(__name__)

IDLE_SECONDS = 300.0  # how long a connection may wait for its next transfer; pullers let go of them earlier


class BlockServer:
    """Serves the published blocks of one pool to pullers. ``async with`` starts and closes it."""

    def __init__(
        self,
        memory: Blocks,
        fingerprint: bytes,
        worker_id: str,
        epoch: int,
        transports: Sequence[Transport],
        host: str = "127.0.0.1",
        lease_seconds: float = 10.0,
        hello_seconds: float = 2.0,
        max_connections: int = 256,
        observer: TransferObserver | None = None,
    ) -> None:
        """The transports stay the caller's, who closes them behind the server. ``host`` is where pullers reach
        this worker. A connection over ``max_connections`` is closed at once, as is one that has not said what
        it wants within ``hello_seconds``. ValueError: ids or digests that no frame can carry."""
        if len(fingerprint) != 32 or not transports:
            raise ValueError("a fingerprint of 32 bytes and at least one transport are needed")
        pack_worker_id(worker_id)
        self.addresses: dict[str, str] = {}  # transport name -> "host:port", filled by start
        self._memory = memory
        self._identity = SourceIdentity(worker_id, epoch, fingerprint, lease_seconds)
        self._transports = transports
        self._host = host
        self._hello_seconds = hello_seconds
        self._max_connections = max_connections
        self._observer: TransferObserver = observer or NullObserver()
        self._publications: dict[bytes, Publication] = {}
        self._published = asyncio.Event()
        self._listeners: list[Listener] = []
        self._sessions: set[asyncio.Task[None]] = set()
        self._lease_keeper: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Listens. OSError if an address cannot be had; nothing is left open then."""
        try:
            for transport in self._transports:
                listener = await transport.listen(self._host, self._serve)
                self._listeners.append(listener)
                self.addresses[transport.name] = listener.address
        except BaseException:
            await self.close()
            raise
        self._lease_keeper = asyncio.create_task(self._keep_leases())
        logger.info("KV blocks are served on %s", self.addresses)

    async def close(self) -> None:
        """Ends every session and releases every transfer (``CLOSED``). Idempotent."""
        for listener in self._listeners:
            await listener.close()
        self._listeners.clear()
        self.addresses.clear()
        if self._lease_keeper is not None:
            self._lease_keeper.cancel()
            await asyncio.gather(self._lease_keeper, return_exceptions=True)
        for publication in list(self._publications.values()):
            publication.release(ReleaseReason.CLOSED)
        for session in self._sessions:
            session.cancel()
        await asyncio.gather(*self._sessions, return_exceptions=True)

    async def __aenter__(self) -> BlockServer:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def join(self, epoch: int) -> None:
        """From now on this server speaks for incarnation ``epoch`` of its worker; before anything is published."""
        assert not self._publications
        self._identity = replace(self._identity, epoch=epoch)

    @property
    def num_published(self) -> int:
        """Transfers that are not released."""
        return len(self._publications)

    @property
    def num_connections(self) -> int:
        return len(self._sessions)

    def publish(self, num_blocks: int) -> Publication:
        """A new transfer of ``num_blocks`` blocks, none of them ready; its lease starts now."""
        assert self.addresses, "the server is not started"
        identity = self._identity
        handle = KvHandle(
            transfer_id=secrets.token_bytes(16),
            secret=secrets.token_bytes(16),
            addresses=dict(self.addresses),
            source=identity.worker_id,
            epoch=identity.epoch,
            fingerprint=identity.fingerprint,
            num_blocks=num_blocks,
        )
        publication = Publication(handle, identity.lease_seconds, self._forget)
        self._publications[handle.transfer_id] = publication
        self._published.set()
        return publication

    def _forget(self, publication: Publication) -> None:
        del self._publications[publication.handle.transfer_id]

    def _serve(self, connection: Connection) -> None:
        if len(self._sessions) >= self._max_connections:
            logger.warning("too many connections: %s is turned away", connection.peer)
            task = asyncio.create_task(connection.close())
        else:
            task = asyncio.create_task(self._serve_transfers(connection))
        self._sessions.add(task)
        task.add_done_callback(self._session_ended)

    async def _serve_transfers(self, connection: Connection) -> None:
        """One transfer behind the other, as long as they end well and the puller has another one soon enough."""
        patience = self._hello_seconds
        try:
            while await Session(connection, self._memory, self._identity, self._publications.get).serve(patience):
                patience = IDLE_SECONDS
        finally:
            await uninterrupted(connection.close())

    def _session_ended(self, task: asyncio.Task[None]) -> None:
        self._sessions.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("a session failed", exc_info=error)

    async def _keep_leases(self) -> None:
        """Sleeps until the first lease can end: new ones end later than those that are there."""
        while True:
            self._published.clear()
            if not self._publications:
                await self._published.wait()
            now = asyncio.get_running_loop().time()
            for publication in list(self._publications.values()):
                if publication.computing:  # its owner will finish it or let it fail
                    publication.touch()
                if publication.deadline <= now:
                    logger.warning(
                        "nobody asked for the transfer in time",
                        extra={"transfer_id": publication.handle.transfer_id.hex()},
                    )
                    publication.release(ReleaseReason.EXPIRED)
                    self._observer.lease_expired()
            first = min((p.deadline for p in self._publications.values()), default=now)
            await asyncio.sleep(max(0.0, first - now))
