"""One transfer on its source: which blocks are ready, how it ended, who may still read it.

Knows no connection: a session reads it and waits on ``changed``. All methods belong to the event loop's thread.
Invariant: ``released`` returns only when no session is attached and none can attach any more.
"""

from __future__ import annotations

import asyncio
import enum
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kvtransfer.faults import Reason, Refusal
from kvtransfer.frames import End
from kvtransfer.handle import KvHandle


class ReleaseReason(enum.StrEnum):
    """Why the source may reuse the blocks."""

    PULLED = "pulled"  # the puller has verified every block
    CANCELLED = "cancelled"  # the puller will not come back
    FAILED = "failed"  # ``Publication.fail``
    EXPIRED = "expired"  # nobody gave a sign of life for the lease
    CLOSED = "closed"  # the server was closed


@dataclass(frozen=True, slots=True)
class Outcome:
    """How the computation ended well."""

    first_token: int
    finished: bool
    at: float  # time.monotonic()

    def end(self) -> End:
        """The frame that says so, now."""
        age_us = int((time.monotonic() - self.at) * 1e6)
        return End(self.first_token, self.finished, min(age_us, (1 << 32) - 1))


class Publication:
    """A transfer that pullers may ask for. Made by ``BlockServer.publish``."""

    def __init__(self, handle: KvHandle, lease_seconds: float, on_release: Callable[[Publication], None]) -> None:
        self.handle = handle
        self.block_ids: list[int] = []  # pool indices of the blocks that are ready, in order
        self.outcome: Outcome | None = None
        self.failure: Refusal | None = None
        self.release_reason: ReleaseReason | None = None
        self.changed = asyncio.Event()
        self._lease_seconds = lease_seconds
        self._on_release = on_release
        self._session: asyncio.Task[None] | None = None
        self._loop = asyncio.get_running_loop()
        self._released: asyncio.Future[ReleaseReason] = self._loop.create_future()
        self.deadline = 0.0  # by the clock of the event loop
        self.touch()

    def ready(self, block_ids: Sequence[int]) -> None:
        """The next blocks of the sequence are complete for all layers. They must not change until ``released``.

        Without effect once the transfer is released."""
        assert self.outcome is None, "blocks after the end"
        assert len(self.block_ids) + len(block_ids) <= self.handle.num_blocks, "more blocks than were announced"
        self.block_ids.extend(block_ids)
        self.changed.set()

    def finish(self, first_token: int, finished: bool) -> None:
        """All blocks are ready. ``finished``: the answer ends with ``first_token``."""
        assert self.outcome is None and len(self.block_ids) == self.handle.num_blocks
        self.outcome = Outcome(first_token, finished, time.monotonic())
        self.changed.set()

    def fail(self, message: str) -> None:
        """The rest will never be computed; a puller is told so. Without effect once the transfer is released."""
        if self.release_reason is None and self.failure is None:
            self.failure = Refusal(Reason.SOURCE_FAILED, message)
            self.changed.set()
            if self._session is None:
                self.release(ReleaseReason.FAILED)

    @property
    def computing(self) -> bool:
        """Whether blocks are still to come."""
        return self.outcome is None and self.failure is None

    def touch(self) -> None:
        """A sign of life of the router or the puller: the lease starts anew."""
        self.deadline = self._loop.time() + self._lease_seconds

    async def released(self) -> ReleaseReason:
        """Returns when no byte of the blocks will be read any more; only then may they be reused."""
        return await asyncio.shield(self._released)

    def release(self, reason: ReleaseReason) -> None:
        """Lets nobody attach any more and ends the session; the first reason counts."""
        if self.release_reason is None:
            self.release_reason = reason
            self._on_release(self)
            if self._session is None:
                self._released.set_result(reason)
            elif self._session is not asyncio.current_task():
                self._session.cancel()

    async def attach(self) -> None:
        """Makes the current task the one session; an earlier one is ended first. Refusal if released."""
        while self._session is not None:
            self._session.cancel()
            await asyncio.wait([self._session])
        if self.release_reason is not None:
            raise Refusal(Reason.EXPIRED, "the transfer was released")
        self._session = asyncio.current_task()
        self.changed.set()

    def detach(self) -> None:
        """The session of the current task has closed its connection."""
        if self._session is asyncio.current_task():
            self._session = None
            if self.release_reason is not None:
                self._released.set_result(self.release_reason)
            elif self.failure is not None:
                self.release(ReleaseReason.FAILED)
            else:
                self.touch()
