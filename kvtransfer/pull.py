"""One pull over one connection: the hot path of a transfer, as the puller sees it.

What the source announces is received straight into the pool, contiguous blocks as one payload, and verified while
the next payload is announced and arrives; what has arrived together is verified together. While the source
computes, a heartbeat counts as progress; once it has announced blocks, only their bytes do.
Invariant: ``received`` leading blocks are verified, and no byte is written once ``close`` has returned.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, TypeVar

from kvtransfer.access import Loan
from kvtransfer.blocks import Blocks
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
from kvtransfer.runs import joined
from kvtransfer.session import slot_of
from kvtransfer.tasks import heard, running, uninterrupted
from kvtransfer.transport import Connection

logger = logging.getLogger(__name__)
T = TypeVar("T")

PARTING_SECONDS = 0.5  # how long the source may take to acknowledge the end


@dataclass(frozen=True, slots=True)
class Run:
    """A payload that is under way or not yet verified."""

    place: int  # of its first block in block_ids
    checksums: tuple[int, ...]  # one for each of its blocks
    attempt: int
    arrived: asyncio.Future[None]
    loan: Loan  # where it arrives


class Pulling:
    """Uses the connection until `close`. ``block_ids`` are the local blocks for ``first …`` of the transfer.

    A connection that carried an earlier transfer still brings the ACK of that one, ``after``: it is read first."""

    def __init__(
        self,
        connection: Connection,
        memory: Blocks,
        stamp: Stamp,
        timeout: float,
        block_ids: Sequence[int],
        first: int,
        after: Stamp | None = None,
    ) -> None:
        self.received = 0  # leading blocks that are good
        self.busy_seconds = 0.0  # spent on blocks that the source had ready
        self.exposed_seconds = 0.0  # from the end of the computation to the last verified block
        self.clean = False  # everything ended well: behind an ACK the connection may carry another transfer
        self._connection = connection
        self._memory = memory
        self._access = memory.access(connection.carries_device_memory)
        self._longest = self._access.run_blocks(memory.block_bytes)
        self._checksum = memory.kinds[0]
        self.stamp = stamp
        self._timeout = timeout
        self._block_ids = block_ids
        self._first = first
        self._after = after
        self._runs: deque[Run] = deque()  # announced and not yet verified, in order
        self._announced = 0  # blocks that a READY has named
        self._arrived = 0  # blocks whose first attempt is there, good or not
        self._damaged: set[int] = set()  # places whose second attempt is under way
        self._end: End | None = None
        self._ended_at = 0.0
        self._busy_since = 0.0
        self._deadline = 0.0  # by the clock of the event loop
        self._heard: asyncio.Future[None] | None = None  # a frame came, or a run was posted; while there is none

    @property
    def way(self) -> str:
        """What the bytes of the pool are in, and how they get there."""
        return self._access.name

    @property
    def bandwidth(self) -> float:
        """Bytes a second while the source had blocks ready; 0 before the first."""
        count = self._announced * self._memory.block_bytes
        return count / self.busy_seconds if self.busy_seconds else 0.0

    async def greet(self, hello: Hello) -> HelloOk:
        """The handshake, with the wish right behind it. Refusal, ConnectionLost, ProtocolError, TimeoutError."""
        await self._send(hello)
        bits = joined(self._block_ids, self._longest, self._access.gathers)
        await self._send(Pull(self._first, 0, self._memory.block_bytes, bits))
        answer = await self._in_time(self._receive())
        if not isinstance(answer, HelloOk):
            raise ProtocolError(f"{type(answer).__name__} instead of a HELLO_OK")
        if answer.block_bytes != self._memory.block_bytes:
            raise Refusal(
                Reason.INCOMPATIBLE, f"blocks of {answer.block_bytes} bytes, not {self._memory.block_bytes}"
            )
        if answer.checksum not in self._memory.kinds:
            raise ProtocolError(f"checksums of kind {answer.checksum!r}, which were not offered")
        self._checksum = answer.checksum
        if answer.num_blocks != self._first + len(self._block_ids):
            raise ProtocolError(f"{answer.num_blocks} blocks, the handle has another number")
        return answer

    async def blocks(self, lease_seconds: float, on_progress: Callable[[int], None]) -> End:
        """Fetches and verifies every block. Raises what ``greet`` raises."""
        self._extend()
        async with (
            running(self._beat(min(self._timeout, lease_seconds) / 4)),
            running(self._listen()) as listening,
        ):
            while self._end is None or self._runs or self._damaged:
                await self._either(listening)
                if listening.done():
                    listening.result()
                if self._runs and self._runs[0].arrived.done():
                    await self._take(self._there(), on_progress)
                    self._extend()
                    if not self._runs:
                        self.busy_seconds += time.perf_counter() - self._busy_since
        self.exposed_seconds = self._end.age_us / 1e6 + time.perf_counter() - self._ended_at
        await self._send(Done())
        self.clean = True
        return self._end

    async def abandon(self) -> None:
        """Tells the source that nobody will ask again, and waits until it has stopped, but not for long."""
        try:
            async with asyncio.timeout(PARTING_SECONDS):
                await self._send(Cancel(abandon=True))
                while not isinstance(await self._receive(), Ack):
                    pass
        except (ConnectionLost, ProtocolError, Refusal, TimeoutError) as error:
            logger.info("the source did not acknowledge the end: %r", error, extra=self._extra)

    async def close(self) -> None:
        """Ends everything that was posted, by closing the connection unless all of it has ended well."""
        if not self.clean:
            await self._connection.close()
        for run in self._runs:
            run.arrived.cancel()
        self._access.close()

    async def _either(self, listening: asyncio.Task[None]) -> None:
        """Returns when the first run has arrived, or if there is none, with the next frame. TimeoutError behind
        the deadline."""
        loop = asyncio.get_running_loop()
        self._heard = None if self._runs else loop.create_future()
        awaited: list[asyncio.Future[None]] = [listening, self._heard or self._runs[0].arrived]
        left = min(self._deadline - loop.time(), self._timeout)
        done, _ = await asyncio.wait(awaited, timeout=left, return_when=asyncio.FIRST_COMPLETED)
        if not done and loop.time() >= self._deadline:
            raise TimeoutError

    async def _listen(self) -> None:
        """Reads frames until it is cancelled, so receives are posted while earlier blocks are verified."""
        while True:
            frame = await self._receive()
            if not self._runs:
                self._extend()
                self._busy_since = time.perf_counter()
            match frame:
                case Heartbeat():
                    pass
                case Ready():
                    await self._expect(frame)
                case End() if self._end is None and self._announced == len(self._block_ids):
                    self._end, self._ended_at = frame, time.perf_counter()
                case _:
                    raise ProtocolError(f"an unexpected {type(frame).__name__}")
            self._wake()

    def _wake(self) -> None:
        if self._heard is not None and not self._heard.done():
            self._heard.set_result(None)

    def _extend(self) -> None:
        self._deadline = asyncio.get_running_loop().time() + self._timeout

    async def _expect(self, ready: Ready) -> None:
        """Posts the receives. ProtocolError unless these blocks are the next ones, or one that was asked for
        again, in runs that this side can receive."""
        place, count = ready.first - self._first, len(ready.checksums)
        if ready.attempt == 0:
            if place != self._announced or place + count > len(self._block_ids):
                raise ProtocolError(f"blocks from {ready.first} out of order")
            self._announced += count
        elif ready.attempt != 1 or place not in self._damaged or count != 1:
            raise ProtocolError(f"block {ready.first}, attempt {ready.attempt} was not asked for")
        begin = 0
        for length in ready.runs:
            await self._post(place + begin, ready.checksums[begin : begin + length], ready.attempt)
            begin += length

    async def _post(self, place: int, checksums: tuple[int, ...], attempt: int) -> None:
        ranges = self._memory.ranges(self._block_ids[place : place + len(checksums)])
        if len(checksums) > self._longest or (len(ranges) > 1 and not self._access.gathers):
            raise ProtocolError(f"blocks from {self._first + place} are not one run, or it is too long")
        if not self._runs:  # a wait for our own memory is not the source's
            self._deadline = math.inf
        loan = await self._access.lend(ranges)
        if not self._runs:
            self._extend()
        arrived = self._connection.post_payload(slot_of(self._first + place, attempt), loan.buffer)
        arrived.add_done_callback(heard)
        self._runs.append(Run(place, checksums, attempt, arrived, loan))
        self._wake()  # the next one may need the memory of this one

    def _there(self) -> list[Run]:
        """The first run, and those behind it that have arrived too, in all as many blocks as one may have."""
        there, blocks = [self._runs[0]], len(self._runs[0].checksums)
        for run in islice(self._runs, 1, None):
            blocks += len(run.checksums)
            if blocks > self._longest or not run.arrived.done() or run.arrived.exception() is not None:
                break
            there.append(run)
        return there

    async def _take(self, runs: Sequence[Run], on_progress: Callable[[int], None]) -> None:
        """Verifies the blocks of the first runs, which are there; a damaged one is asked for again, once."""
        runs[0].arrived.result()
        await self._access.store([run.loan for run in runs])
        for run in runs:
            self._access.release(run.loan)
        wanted = [(run.place + i, known, run.attempt) for run in runs for i, known in enumerate(run.checksums)]
        blocks = [self._block_ids[place] for place, _, _ in wanted]
        found = await self._memory.checksums(self._checksum, blocks, 0, self._memory.block_bytes)
        for _ in runs:
            self._runs.popleft()
        for (place, checksum, attempt), here in zip(wanted, found, strict=True):
            self._arrived = max(self._arrived, place + 1)
            if here == checksum:
                self._damaged.discard(place)
            elif attempt == 0:
                await self._ask_again(place)
            else:
                raise Refusal(Reason.CHECKSUM, f"block {self._first + place} was damaged twice")
        leading = min(self._damaged, default=self._arrived)
        if leading > self.received:
            self.received = leading
            on_progress(leading)

    async def _ask_again(self, place: int) -> None:
        logger.warning("block %d was damaged on its way", self._first + place, extra=self._extra)
        self._damaged.add(place)
        await self._send(Resend(self._first + place, 1))

    async def _beat(self, interval: float) -> None:
        """Signs of life, so that the source keeps the lease while it computes.

        One that is being sent when all blocks are there goes out whole: a connection left in the middle of a frame
        can't carry the DONE."""
        while True:
            await asyncio.sleep(interval)
            await uninterrupted(self._send(Heartbeat()))

    async def _send(self, frame: Frame) -> None:
        await self._in_time(self._connection.send_frame(encode(self.stamp, frame)))

    async def _receive(self) -> Frame:
        """The next frame of this transfer. Refusal for an ERROR."""
        stamp, frame = decode(await self._connection.recv_frame())
        while stamp == self._after:  # the earlier transfer's, up to its ACK
            if isinstance(frame, Ack):
                self._after = None
            stamp, frame = decode(await self._connection.recv_frame())
        if isinstance(frame, Error):
            raise Refusal(frame.reason, frame.message)
        if stamp != self.stamp:
            raise ProtocolError(f"a frame of {stamp}")
        return frame

    async def _in_time(self, coroutine: Coroutine[Any, Any, T]) -> T:
        async with asyncio.timeout(self._timeout):
            return await coroutine

    @property
    def _extra(self) -> dict[str, str]:
        return {"transfer_id": self.stamp.transfer_id.hex()}
