"""The puller's side: fetches the blocks of a transfer straight into the local pool.

Knows block indices and bytes, no requests. Which transport is used, and how fast it was, is logged and observed.
Invariant: when ``pull`` has returned, raised or been cancelled, no byte is written into its blocks any more.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kvtransfer.blocks import Blocks
from kvtransfer.checksums import all_of
from kvtransfer.faults import ConnectionLost, ProtocolError, Reason, Refusal
from kvtransfer.frames import Hello, HelloOk, Stamp, pack_worker_id
from kvtransfer.handle import KvHandle
from kvtransfer.idle import IdleConnections
from kvtransfer.observer import NullObserver, TransferObserver
from kvtransfer.pull import Pulling
from kvtransfer.tasks import ended, uninterrupted
from kvtransfer.transport import Connection, Transport
from splitserve.errors import Incompatible, TransferFailed
from splitserve.layout import PROTOCOL_VERSION

logger = logging.getLogger(__name__)

RECENT = 0.2  # weight of the latest pull in the average bandwidth


@dataclass(frozen=True, slots=True)
class PullResult:
    """What a whole pull brought."""

    first_token: int
    finished: bool  # the answer ends with ``first_token``
    blocks: int
    bytes: int
    seconds: float  # from the call to the last verified block
    exposed_seconds: float  # the part of them behind the end of the source's computation
    transport: str


class PullClient:
    """Pulls into one pool. ``async with`` closes it."""

    def __init__(
        self,
        memory: Blocks,
        fingerprint: bytes,
        worker_id: str,
        epoch: int,
        transports: Sequence[Transport],
        progress_timeout: float = 2.0,
        observer: TransferObserver | None = None,
    ) -> None:
        """``transports`` in order of preference; they stay the caller's. ``progress_timeout`` is in seconds."""
        pack_worker_id(worker_id)
        self._memory = memory
        self._fingerprint = fingerprint
        self._worker_id = worker_id
        self._epoch = epoch
        self._transports = transports
        self._progress_timeout = progress_timeout
        self._observer: TransferObserver = observer or NullObserver()
        self._pulls: set[asyncio.Task[PullResult]] = set()
        self._idle = IdleConnections()
        self._closed = False
        self.bytes_per_second = 0.0  # recent average while blocks were there; 0 before the first pull

    async def close(self) -> None:
        """Cancels the pulls under way; returns when none of them writes any more. Idempotent."""
        self._closed = True
        for pull in list(self._pulls):
            pull.cancel()
        await asyncio.gather(*self._pulls, return_exceptions=True)
        await self._idle.close()

    async def __aenter__(self) -> PullClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def join(self, epoch: int) -> None:
        """From now on this client speaks for incarnation ``epoch`` of its worker."""
        self._epoch = epoch

    async def pull(
        self,
        handle: KvHandle,
        block_ids: Sequence[int],
        first: int = 0,
        on_progress: Callable[[int], None] | None = None,
    ) -> PullResult:
        """Receives the blocks ``first … num_blocks - 1`` of the transfer into the local ``block_ids``.

        ``on_progress(n)``: the first ``n`` of ``block_ids`` are complete and verified. Raises TransferFailed, with
        a :class:`~kvtransfer.faults.Reason` and the number of leading blocks that are good, or Incompatible.
        Cancelling it, once it is connected, tells the source that nobody will ask again; another failure leaves
        the transfer there for a second attempt while its lease holds."""
        assert not self._closed and len(block_ids) == handle.num_blocks - first
        task = asyncio.create_task(self._pull(handle, block_ids, first, on_progress or _ignore))
        self._pulls.add(task)
        task.add_done_callback(self._pulls.discard)
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            task.cancel()
            await ended(task)
            raise

    async def _pull(
        self, handle: KvHandle, block_ids: Sequence[int], first: int, on_progress: Callable[[int], None]
    ) -> PullResult:
        if handle.fingerprint != self._fingerprint:
            raise Incompatible(
                f"model or layout {handle.fingerprint.hex()[:16]} of {handle.source} "
                f"is not {self._fingerprint.hex()[:16]} of {self._worker_id}"
            )
        started = time.perf_counter()
        transport = self._choose(handle)
        extra = {"transfer_id": handle.transfer_id.hex()}
        self._observer.pull_started(transport.name)
        pulling: Pulling | None = None
        try:
            connection, pulling, welcome = await self._open(transport, handle, block_ids, first)
            try:
                end = await pulling.blocks(welcome.lease_ms / 1000, self._reporter(transport.name, on_progress))
                seconds = time.perf_counter() - started
            except asyncio.CancelledError:
                await self._abandon(pulling)
                raise
            finally:
                await uninterrupted(self._put_back(pulling, connection, handle.addresses[transport.name]))
        except asyncio.CancelledError:
            self._observer.pull_failed(transport.name, "cancelled")
            raise
        except (Refusal, ConnectionLost, ProtocolError, TimeoutError) as error:
            failure = _explain(error, handle, transport.name, pulling)
            reason = failure.reason if isinstance(failure, TransferFailed) else Reason.INCOMPATIBLE
            self._observer.pull_failed(transport.name, reason)
            logger.warning("%s", failure, extra=extra)
            raise failure from error
        count = len(block_ids) * self._memory.block_bytes
        if count:
            last = self.bytes_per_second or pulling.bandwidth
            self.bytes_per_second = last + RECENT * (pulling.bandwidth - last)
        exposed = min(seconds, pulling.exposed_seconds)
        self._observer.pull_finished(transport.name, seconds, exposed)
        logger.info(
            "pulled %d blocks into %s from %s over %s (available: %s) in %.1f ms, %.2f GB/s when they were ready",
            len(block_ids), pulling.way, handle.source, transport.name, connection.lanes, seconds * 1e3,
            pulling.bandwidth / 1e9, extra=extra,
        )  # fmt: skip
        return PullResult(end.first_token, end.finished, len(block_ids), count, seconds, exposed, transport.name)

    def _choose(self, handle: KvHandle) -> Transport:
        for transport in self._transports:
            if transport.name in handle.addresses:
                return transport
        mine = ", ".join(transport.name for transport in self._transports)
        theirs = ", ".join(handle.addresses)
        raise TransferFailed(
            f"no transport in common: {self._worker_id} has {mine or 'none'}, "
            f"{handle.source} has {theirs or 'none'}",
            Reason.CONNECT,
        )

    async def _open(
        self, transport: Transport, handle: KvHandle, block_ids: Sequence[int], first: int
    ) -> tuple[Connection, Pulling, HelloOk]:
        """The handshake, over an idle connection if there is one: making a new one takes UCX long."""
        stamp = Stamp(handle.transfer_id, handle.epoch, self._epoch)
        hello = Hello(
            version=PROTOCOL_VERSION,
            fingerprint=self._fingerprint,
            secret=handle.secret,
            source=handle.source,
            puller=self._worker_id,
            timeout_ms=max(1, int(self._progress_timeout * 1000)),
            checksums=all_of(self._memory.kinds),
        )
        while True:
            idle = self._idle.take(handle.addresses[transport.name])
            connection, after = idle or (await self._connect(transport, handle), None)
            pulling = Pulling(connection, self._memory, stamp, self._progress_timeout, block_ids, first, after)
            try:
                return connection, pulling, await pulling.greet(hello)
            except BaseException as error:
                try:
                    if isinstance(error, asyncio.CancelledError):
                        await self._abandon(pulling)
                finally:
                    await uninterrupted(connection.close())
                if idle is None or not isinstance(error, ConnectionLost):
                    raise  # but an idle one may have been lost long ago: that says nothing of the source

    async def _connect(self, transport: Transport, handle: KvHandle) -> Connection:
        address = handle.addresses[transport.name]
        try:
            async with asyncio.timeout(self._progress_timeout):
                return await transport.connect(address)
        except (ConnectionLost, TimeoutError) as error:
            why = str(error) or "no answer"
            raise Refusal(Reason.CONNECT, f"cannot connect to {address} over {transport.name}: {why}") from error

    async def _abandon(self, pulling: Pulling) -> None:
        if not self._closed:  # a closing worker leaves the blocks to another one
            await uninterrupted(pulling.abandon())

    async def _put_back(self, pulling: Pulling, connection: Connection, address: str) -> None:
        await pulling.close()
        if pulling.clean and not self._closed:
            await self._idle.put(address, connection, pulling.stamp)

    def _reporter(self, transport: str, on_progress: Callable[[int], None]) -> Callable[[int], None]:
        counted = 0

        def progress(leading: int) -> None:
            nonlocal counted
            self._observer.bytes_received(transport, (leading - counted) * self._memory.block_bytes)
            counted = leading
            on_progress(leading)

        return progress


def _explain(
    error: Exception, handle: KvHandle, transport: str, pulling: Pulling | None
) -> TransferFailed | Incompatible:
    received = 0 if pulling is None else pulling.received
    where = f"transfer {handle.transfer_id.hex()} from {handle.source} over {transport}, after {received} blocks"
    if isinstance(error, Refusal):
        if error.reason is Reason.INCOMPATIBLE:
            return Incompatible(error.message)
        return TransferFailed(f"{error.message} ({where})", error.reason, received)
    if isinstance(error, TimeoutError):
        return TransferFailed(f"no sign of life ({where})", Reason.STALLED, received)
    reason = Reason.PROTOCOL if isinstance(error, ProtocolError) else Reason.PEER_LOST
    return TransferFailed(f"{error} ({where})", reason, received)


def _ignore(leading: int) -> None:
    return None
