"""One transfer served over one connection: from its HELLO to its DONE.

Sends blocks as they become ready, several at a time, and a heartbeat whenever there is nothing to send.
Invariant: the publication is detached when every send has completed or the connection is closed, so no block
is read behind its back.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import accumulate

from kvtransfer.access import Loan
from kvtransfer.blocks import Blocks
from kvtransfer.checksums import Checksum, first_common
from kvtransfer.faults import ConnectionLost, ProtocolError, Reason, Refusal
from kvtransfer.frames import (
    Ack,
    Cancel,
    Done,
    Error,
    Frame,
    Heartbeat,
    Hello,
    HelloOk,
    Pull,
    Ready,
    Resend,
    Stamp,
    decode,
    encode,
)
from kvtransfer.publication import Publication, ReleaseReason
from kvtransfer.runs import cut
from kvtransfer.tasks import heard, running, uninterrupted
from kvtransfer.transport import Connection
from splitserve.layout import PROTOCOL_VERSION

logger = logging.getLogger(__name__)

IN_FLIGHT = 32  # payloads being sent at a time
MAX_RESENDS = 16  # of one session: a line that damages more is of no use
LINGER_SECONDS = 1.0  # how long the last frame may take to be read before the connection is closed
RESEND_SLOT = 1 << 20  # slot of a payload: index in the transfer + attempt * RESEND_SLOT


@dataclass(frozen=True, slots=True)
class SourceIdentity:
    """What a puller must agree with."""

    worker_id: str
    epoch: int
    fingerprint: bytes
    lease_seconds: float


def slot_of(index: int, attempt: int) -> int:
    """The slot that carries the payload of block ``index`` of a transfer."""
    assert index < RESEND_SLOT
    return index + attempt * RESEND_SLOT


class Session:
    """Owns the connection while it serves it."""

    def __init__(
        self,
        connection: Connection,
        memory: Blocks,
        identity: SourceIdentity,
        find: Callable[[bytes], Publication | None],
    ) -> None:
        self._connection = connection
        self._memory = memory
        self._access = memory.access(connection.carries_device_memory)
        self._checksum = memory.kinds[0]
        self._identity = identity
        self._find = find
        self._stamp = Stamp(bytes(16), identity.epoch, 0)
        self._resends: list[Resend] = []
        self._sends: set[asyncio.Future[None]] = set()
        self._stopping = False

    async def serve(self, hello_seconds: float) -> bool:
        """Until the puller is done, gone, refused or too slow with its HELLO. True: it is done, all was
        acknowledged, and the connection may carry another transfer; else the connection is closed."""
        publication: Publication | None = None
        clean = False
        try:
            async with asyncio.timeout(hello_seconds):
                hello = await self._handshake()
                publication = self._admit(hello)
                await publication.attach()
                self._checksum = self._agree(hello)
                await self._send(self._welcome(publication))
                pull = await self._receive()
            last = await self._transfer(publication, pull, interval=max(0.01, hello.timeout_ms / 4000))
            if isinstance(last, Done):
                async with asyncio.timeout(LINGER_SECONDS):  # no lease ends a transfer that is released
                    await self._send(Ack())
                clean = True
            else:
                await self._part(Ack())
        except Refusal as refusal:
            await self._part(Error(refusal.reason, refusal.message))
        except ProtocolError as error:
            await self._part(Error(Reason.PROTOCOL, str(error)))
        except (ConnectionLost, TimeoutError) as error:
            logger.info("puller %s is gone: %s", self._connection.peer, error or "too slow", extra=self._extra)
        finally:
            try:
                if not clean:
                    await uninterrupted(self._connection.close())
            finally:
                self._access.close()
                if publication is not None:
                    publication.detach()
        return clean

    @property
    def _extra(self) -> dict[str, str]:
        return {"transfer_id": self._stamp.transfer_id.hex()}

    async def _handshake(self) -> Hello:
        self._stamp, hello = decode(await self._connection.recv_frame())
        if not isinstance(hello, Hello):
            raise ProtocolError(f"{type(hello).__name__} instead of a HELLO")
        return hello

    def _admit(self, hello: Hello) -> Publication:
        """Refusal that names the first difference. The secret comes before anything is told about the transfer."""
        mine = self._identity
        if hello.version != PROTOCOL_VERSION:
            raise Refusal(
                Reason.INCOMPATIBLE, f"protocol version {hello.version}, {mine.worker_id} has {PROTOCOL_VERSION}"
            )
        if hello.fingerprint != mine.fingerprint:
            raise Refusal(
                Reason.INCOMPATIBLE,
                f"model or layout {hello.fingerprint.hex()[:16]} of {hello.puller} "
                f"is not {mine.fingerprint.hex()[:16]} of {mine.worker_id}",
            )
        if (hello.source, self._stamp.source_epoch) != (mine.worker_id, mine.epoch):
            raise Refusal(
                Reason.REFUSED,
                f"{hello.source}@{self._stamp.source_epoch} was meant, this is {mine.worker_id}@{mine.epoch}",
            )
        publication = self._find(self._stamp.transfer_id)
        if publication is None:
            raise Refusal(Reason.EXPIRED, f"transfer {self._stamp.transfer_id.hex()} is not known (any more)")
        if not hmac.compare_digest(hello.secret, publication.handle.secret):
            raise Refusal(Reason.REFUSED, "wrong secret")
        if hello.timeout_ms == 0:
            raise ProtocolError("a progress timeout of 0")
        return publication

    def _agree(self, hello: Hello) -> Checksum:
        kind = first_common(self._memory.kinds, hello.checksums)
        if kind is None:
            raise Refusal(Reason.INCOMPATIBLE, f"no checksum in common with {hello.puller}")
        return kind

    def _welcome(self, publication: Publication) -> HelloOk:
        return HelloOk(
            PROTOCOL_VERSION,
            self._identity.fingerprint,
            max(1, int(self._identity.lease_seconds * 1000)),
            publication.handle.num_blocks,
            self._memory.block_bytes,
            self._checksum,
        )

    async def _transfer(self, publication: Publication, pull: Frame, interval: float) -> Done | Cancel:
        if isinstance(pull, Cancel):  # given up while it was welcomed
            return _heeded(pull, publication)
        if not isinstance(pull, Pull):
            raise ProtocolError(f"{type(pull).__name__} instead of a PULL")
        if pull.first > publication.handle.num_blocks or pull.length == 0:
            raise ProtocolError(f"blocks from {pull.first}, {pull.length} bytes each")
        if pull.offset + pull.length > self._memory.block_bytes:
            raise ProtocolError(f"bytes past the end of a block of {self._memory.block_bytes}")
        publication.touch()
        async with (
            running(self._send_blocks(publication, pull, interval)) as sender,
            running(self._listen(publication, pull)) as listener,
        ):
            await asyncio.wait([sender, listener], return_when=asyncio.FIRST_COMPLETED)
            if sender.done():
                sender.result()
            last = _heeded(listener.result(), publication)
            self._stopping = True
            publication.changed.set()
            async with asyncio.timeout(LINGER_SECONDS):
                await asyncio.wait([sender])
            sender.result()
        return last

    async def _listen(self, publication: Publication, pull: Pull) -> Done | Cancel:
        """The puller's frames, until it wants no more."""
        budget = MAX_RESENDS
        while True:
            frame = await self._receive()
            publication.touch()
            match frame:
                case Heartbeat():
                    continue
                case Resend(index=index, attempt=1) if pull.first <= index < len(publication.block_ids):
                    if budget == 0:
                        raise ProtocolError("too many blocks asked for again")
                    budget -= 1
                    self._resends.append(frame)
                    publication.changed.set()
                case Done() | Cancel():
                    return frame
                case _:
                    raise ProtocolError(f"an unexpected {frame}")

    async def _send_blocks(self, publication: Publication, pull: Pull, interval: float) -> None:
        """Blocks as they become ready, END behind the last, heartbeats in between; until told to stop."""
        position, batch, complete = pull.first, self._access.first_batch, False
        while not self._stopping:
            publication.changed.clear()
            if self._resends:
                resend = self._resends.pop(0)
                await self._send_batch(publication, pull, resend.index, 1, resend.attempt)
            elif publication.failure is not None:
                raise publication.failure
            elif position < len(publication.block_ids):
                count = min(batch, len(publication.block_ids) - position)
                await self._send_batch(publication, pull, position, count, 0)
                position += count
                batch = min(2 * batch, self._access.batch)
            elif publication.outcome is not None and not complete:
                complete = True
                await self._send(publication.outcome.end())
            else:
                await self._wait_or_beat(publication.changed, interval)
        await self._at_most_in_flight(0)

    async def _send_batch(
        self, publication: Publication, pull: Pull, first: int, count: int, attempt: int
    ) -> None:
        blocks = publication.block_ids[first : first + count]
        checksums = await self._memory.checksums(self._checksum, blocks, pull.offset, pull.length)
        whole = pull.length == self._memory.block_bytes
        longest = self._access.run_blocks(pull.length) if whole else 1
        payloads, place = [], 0
        for run in cut(blocks, first - pull.first, pull.joined, longest, self._access.gathers):
            payloads.append(self._memory.ranges(blocks[place : place + run], pull.offset, pull.length))
            place += run
        loans = await self._access.load(payloads)
        runs = tuple(loan.nbytes // pull.length for loan in loans)
        await self._send(Ready(first, runs, tuple(checksums), attempt))
        for place, loan in zip(accumulate(runs, initial=0), loans, strict=False):
            await self._at_most_in_flight(IN_FLIGHT - 1)
            send = self._connection.send_payload(slot_of(first + place, attempt), loan.buffer)
            send.add_done_callback(partial(self._sent, loan))
            self._sends.add(send)

    def _sent(self, loan: Loan, send: asyncio.Future[None]) -> None:
        heard(send)
        if not send.cancelled() and send.exception() is None:  # else UCX may read it until the connection ends
            self._access.release(loan)

    async def _at_most_in_flight(self, count: int) -> None:
        while len(self._sends) > count:
            done, self._sends = await asyncio.wait(self._sends, return_when=asyncio.FIRST_COMPLETED)
            for send in done:
                send.result()

    async def _wait_or_beat(self, changed: asyncio.Event, interval: float) -> None:
        try:
            async with asyncio.timeout(interval):
                await changed.wait()
        except TimeoutError:
            await self._send(Heartbeat())

    async def _send(self, frame: Frame) -> None:
        await self._connection.send_frame(encode(self._stamp, frame))

    async def _receive(self) -> Frame:
        stamp, frame = decode(await self._connection.recv_frame())
        if stamp != self._stamp:
            raise ProtocolError(f"a frame of {stamp}")
        return frame

    async def _part(self, last: Frame) -> None:
        """Sends the last frame and waits until the peer has closed: what closes first may lose it."""
        try:
            async with asyncio.timeout(LINGER_SECONDS):
                await self._send(last)
                while True:
                    await self._connection.recv_frame()
        except (ConnectionLost, ProtocolError, TimeoutError) as error:
            logger.debug("parted from %s: %r", self._connection.peer, error, extra=self._extra)


def _heeded(last: Done | Cancel, publication: Publication) -> Done | Cancel:
    if isinstance(last, Done):
        publication.release(ReleaseReason.PULLED)
    elif last.abandon:
        publication.release(ReleaseReason.CANCELLED)
    return last
