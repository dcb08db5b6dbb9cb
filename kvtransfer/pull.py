"""One pull over one connection: the hot path of a transfer, as the puller sees it.

Receives are posted ahead of the blocks, straight into the pool. While the source computes, a heartbeat counts as
progress; once it has announced blocks, only their bytes do.
Invariant: ``received`` leading blocks are verified, and no byte is written once ``close`` has returned.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence

from kvtransfer.blocks import BlockMemory
from kvtransfer.faults import ConnectionLost, ProtocolError, Reason, Refusal
from kvtransfer.frames import (
    Ack,
    Cancel,
    Done,
    End,
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
from kvtransfer.session import slot_of
from kvtransfer.tasks import running
from kvtransfer.transport import Connection

logger = logging.getLogger(__name__)

WINDOW = 64  # receives posted ahead
PARTING_SECONDS = 0.5  # how long the source may take to acknowledge the end


class Pulling:
    """Uses the connection until `close`. ``block_ids`` are the local blocks for ``first …`` of the transfer."""

    def __init__(
        self,
        connection: Connection,
        memory: BlockMemory,
        stamp: Stamp,
        timeout: float,
        block_ids: Sequence[int],
        first: int,
    ) -> None:
        self.received = 0  # leading blocks that are good
        self.busy_seconds = 0.0  # spent on blocks that the source had ready
        self.clean = False  # the source has acknowledged the end: the connection may carry another transfer
        self._connection = connection
        self._memory = memory
        self._stamp = stamp
        self._timeout = timeout
        self._block_ids = block_ids
        self._first = first
        self._posted: dict[tuple[int, int], asyncio.Future[None]] = {}  # by place in block_ids and attempt
        self._next_to_post = 0
        self._announced = 0  # blocks that a READY has named
        self._arrived = 0  # blocks whose first attempt is there, good or not
        self._damaged: set[int] = set()  # places whose second attempt is under way

    @property
    def bandwidth(self) -> float:
        """Bytes a second while the source had blocks ready; 0 before the first."""
        count = self._announced * self._memory.block_bytes
        return count / self.busy_seconds if self.busy_seconds else 0.0

    async def greet(self, hello: Hello) -> HelloOk:
        """The handshake. Refusal, ConnectionLost, ProtocolError, TimeoutError."""
        await self._send(hello)
        answer = await self._receive()
        if not isinstance(answer, HelloOk):
            raise ProtocolError(f"{type(answer).__name__} instead of a HELLO_OK")
        if answer.block_bytes != self._memory.block_bytes:
            raise Refusal(
                Reason.INCOMPATIBLE, f"blocks of {answer.block_bytes} bytes, not {self._memory.block_bytes}"
            )
        if answer.num_blocks != self._first + len(self._block_ids):
            raise ProtocolError(f"{answer.num_blocks} blocks, the handle has another number")
        return answer

    async def blocks(self, lease_seconds: float, on_progress: Callable[[int], None]) -> End:
        """Fetches and verifies every block. Raises what ``greet`` raises."""
        self._post_window()
        await self._send(Pull(self._first, 0, self._memory.block_bytes))
        end: End | None = None
        async with running(self._beat(min(self._timeout, lease_seconds) / 4)):
            while end is None or self._damaged:
                frame = await self._receive()
                match frame:
                    case Heartbeat():
                        continue
                    case Ready():
                        await self._take(frame, on_progress)
                    case End() if end is None and self._announced == len(self._block_ids):
                        end = frame
                    case _:
                        raise ProtocolError(f"an unexpected {type(frame).__name__}")
        self.clean = await self._part(Done())
        return end

    async def abandon(self) -> None:
        """Tells the source that nobody will ask again, and waits until it has stopped, but not for long."""
        await self._part(Cancel(abandon=True))

    async def close(self) -> None:
        """Ends everything that was posted, by closing the connection unless all of it has ended well."""
        if not self.clean:
            await self._connection.close()
        for future in self._posted.values():
            if future.done() and not future.cancelled():
                future.exception()  # lost with the connection, and nobody waits for it
            future.cancel()

    async def _take(self, ready: Ready, on_progress: Callable[[int], None]) -> None:
        """The announced blocks, in order; a damaged one is asked for again, once."""
        start = time.perf_counter()
        self._expect(ready)
        for place, checksum in enumerate(ready.checksums, ready.first - self._first):
            self._post_window()
            async with asyncio.timeout(self._timeout):
                await self._posted.pop((place, ready.attempt))
            self._arrived = max(self._arrived, place + 1)
            if self._memory.checksum(self._block_ids[place]) == checksum:
                self._damaged.discard(place)
            elif ready.attempt == 0:
                await self._ask_again(place)
            else:
                raise Refusal(Reason.CHECKSUM, f"block {self._first + place} was damaged twice")
            self._advance(on_progress)
        self.busy_seconds += time.perf_counter() - start

    def _expect(self, ready: Ready) -> None:
        """ProtocolError unless these blocks are the next ones, or one that was asked for again."""
        place, count = ready.first - self._first, len(ready.checksums)
        if ready.attempt == 0:
            if place != self._announced or place + count > len(self._block_ids):
                raise ProtocolError(f"blocks from {ready.first} out of order")
            self._announced += count
        elif ready.attempt != 1 or place not in self._damaged or count != 1:
            raise ProtocolError(f"block {ready.first}, attempt {ready.attempt} was not asked for")

    async def _ask_again(self, place: int) -> None:
        logger.warning("block %d was damaged on its way", self._first + place, extra=self._extra)
        self._damaged.add(place)
        self._post(place, attempt=1)
        await self._send(Resend(self._first + place, 1))

    def _advance(self, on_progress: Callable[[int], None]) -> None:
        leading = min(self._damaged, default=self._arrived)
        if leading > self.received:
            self.received = leading
            on_progress(leading)

    def _post_window(self) -> None:
        while self._next_to_post < min(len(self._block_ids), self._arrived + WINDOW):
            self._post(self._next_to_post, attempt=0)
            self._next_to_post += 1

    def _post(self, place: int, attempt: int) -> None:
        slot = slot_of(self._first + place, attempt)
        into = self._memory.block(self._block_ids[place])
        self._posted[place, attempt] = self._connection.post_payload(slot, into)

    async def _beat(self, interval: float) -> None:
        """Signs of life, so that the source keeps the lease while it computes."""
        while True:
            await asyncio.sleep(interval)
            await self._send(Heartbeat())

    async def _part(self, last: Done | Cancel) -> bool:
        """The end is heard before the connection goes, unless the source is slow: then its lease must end it."""
        try:
            async with asyncio.timeout(PARTING_SECONDS):
                await self._send(last)
                while not isinstance(await self._receive(), Ack):
                    pass
            return True
        except (ConnectionLost, ProtocolError, Refusal, TimeoutError) as error:
            logger.info("the source did not acknowledge the end: %r", error, extra=self._extra)
            return False

    async def _send(self, frame: Frame) -> None:
        async with asyncio.timeout(self._timeout):
            await self._connection.send_frame(encode(self._stamp, frame))

    async def _receive(self) -> Frame:
        """The next frame of this transfer. Refusal for an ERROR; TimeoutError for silence."""
        async with asyncio.timeout(self._timeout):
            stamp, frame = decode(await self._connection.recv_frame())
        if isinstance(frame, Error):
            raise Refusal(frame.reason, frame.message)
        if stamp != self._stamp:
            raise ProtocolError(f"a frame of {stamp}")
        return frame

    @property
    def _extra(self) -> dict[str, str]:
        return {"transfer_id": self._stamp.transfer_id.hex()}
