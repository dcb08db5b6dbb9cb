"""A worker's voice in the directory: its lease, its load and the blocks that it owns.

Owns one task; knows no engine, only functions that it asks. Invariant: whatever happens to Redis, the worker goes
on, and once Redis answers again the directory says what the worker says.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Self

from splitserve.cluster import WorkerInfo, WorkerLoad
from splitserve.directory import Directory, HeartbeatResult
from splitserve.directory_records import TransferRecord
from splitserve.errors import Unavailable
from splitserve.logs import ContextLogger

logger = logging.getLogger(__name__)

BlockEvents = tuple[list[bytes], list[bytes]]  # filled, evicted: net changes, no hash in both


@dataclass(frozen=True, slots=True)
class AgentConfig:
    """``max_transfers``: transfer records kept while Redis is away."""

    heartbeat_seconds: float = 1.0
    flush_seconds: float = 0.05
    idle_flush_seconds: float = 0.2  # while there is nothing new: an idle worker sleeps
    max_transfers: int = 4096


class WorkerAgent:
    """Registers a worker for the length of an ``async with`` block and keeps its entry true.

    ``load``, ``take_block_events`` and ``all_blocks`` are called on the event loop and must return at once.
    ``take_block_events`` gives what changed since it was last called, ``all_blocks`` every block owned now.
    ``on_superseded`` is called once if another process registers the same worker id; the agent then is silent.
    """

    def __init__(
        self,
        directory: Directory,
        info: WorkerInfo,
        load: Callable[[], WorkerLoad],
        take_block_events: Callable[[], BlockEvents],
        all_blocks: Callable[[], Iterable[bytes]],
        on_superseded: Callable[[], None] | None = None,
        config: AgentConfig | None = None,
    ) -> None:
        self._directory = directory
        self._info = info
        self._load = load
        self._take_block_events = take_block_events
        self._all_blocks = all_blocks
        self._on_superseded = on_superseded
        self._config = config or AgentConfig()
        self._log = ContextLogger(logger, worker_id=info.id)
        self._transfers: list[TransferRecord] = []
        self._announce = True  # the directory does not have all our blocks
        self._beat_due = 0.0  # in loop time
        self._outage_began: float | None = None
        self._draining = False
        self._superseded = False
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    @property
    def info(self) -> WorkerInfo:
        """The worker; with its epoch once started."""
        return self._info

    @property
    def connected(self) -> bool:
        """Whether the directory took what was last said."""
        return self._task is not None and self._outage_began is None and not self._superseded

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def start(self) -> WorkerInfo:
        """Registers and announces what the worker owns. Raises Unavailable when Redis fails."""
        assert self._task is None, "already started"
        self._info = await self._directory.register(self._info)
        self._task = asyncio.create_task(self._run(), name=f"agent of {self._info.id}")
        return self._info

    async def close(self) -> None:
        """Leaves the directory, as far as Redis answers within its deadline. Raises what broke the task."""
        if self._task is None:
            return
        task, self._task = self._task, None
        task.cancel()
        try:
            await task
        except asyncio.CancelledError:
            if not task.cancelled():
                raise
        finally:
            await self._leave()

    async def wait(self) -> None:
        """Returns when the agent has been superseded; raises what broke it."""
        assert self._task is not None, "not started"
        await asyncio.shield(self._task)

    @property
    def ended(self) -> bool:
        """Whether it keeps the worker's entry no more; `wait` tells why."""
        return self._task is not None and self._task.done()

    def set_draining(self, draining: bool = True) -> None:
        """From now on the worker is listed as draining: routers send it nothing new."""
        self._draining = draining
        self.beat()

    def beat(self) -> None:
        """Sends a heartbeat now, because the load has changed much."""
        self._beat_due = 0.0
        self._wake.set()

    def record_transfer(self, record: TransferRecord) -> None:
        """Notes a transfer's state with the next flush; dropped, oldest first, while Redis is away for long."""
        self._transfers.append(record)
        if len(self._transfers) > self._config.max_transfers:
            del self._transfers[: len(self._transfers) // 2]

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        pause = self._config.flush_seconds
        try:
            while not self._superseded:
                said = await self._step(loop.time())
                self._wake.clear()
                pause = self._config.flush_seconds if said else min(2 * pause, self._config.idle_flush_seconds)
                if self._outage_began is not None:
                    pause = max(pause, self._beat_due - loop.time())
                await _wait(self._wake, pause)
        except Exception:
            self._log.critical("the worker's agent failed: its lease will end", exc_info=True)
            raise

    async def _step(self, now: float) -> bool:
        """Says what is new, and whether there was anything; after a failure, everything is said again."""
        said = False
        try:
            if now >= self._beat_due:
                self._beat_due = now + self._config.heartbeat_seconds
                await self._heartbeat()
            if not self._superseded:
                said = await self._flush()
        except Unavailable as error:
            self._outage(error)
        else:
            self._recovered()
        return said

    async def _heartbeat(self) -> None:
        load = self._load()
        if self._draining:
            load = replace(load, draining=True)
        result = await self._directory.heartbeat(self._info, load)
        if result is HeartbeatResult.SUPERSEDED:
            self._log.error("another process has registered this worker id: leaving the directory to it")
            self._superseded = True
            if self._on_superseded is not None:
                self._on_superseded()
        elif result is HeartbeatResult.LOST:
            self._log.warning("the directory had forgotten this worker: announcing all blocks again")
            self._announce = True

    async def _flush(self) -> bool:
        filled, evicted = self._take_block_events()
        said = bool(self._announce or filled or evicted or self._transfers)
        if self._announce:
            # Changes from here on come with later events, so none is missed; saying one twice does no harm.
            accepted = await self._directory.announce(self._info, list(self._all_blocks()))
        else:
            accepted = await self._directory.apply_block_events(self._info, filled, evicted)
        self._announce = not accepted
        if not accepted:
            self._beat_due = 0.0  # the next heartbeat tells why
        if self._transfers:
            transfers, self._transfers = self._transfers, []
            await self._directory.record_transfers(transfers)
        return said

    def _outage(self, error: Unavailable) -> None:
        now = asyncio.get_running_loop().time()
        # A call without an answer may have been run, even long after: what Redis has can't be known.
        self._announce = True
        if self._outage_began is None:
            self._outage_began = now
            self._log.warning("the directory is away (%s); the worker goes on", error.message)
        self._beat_due = now + self._config.heartbeat_seconds

    def _recovered(self) -> None:
        if self._outage_began is not None:
            seconds = asyncio.get_running_loop().time() - self._outage_began
            self._outage_began = None
            self._log.info("the directory is back after %.1f s", seconds)

    async def _leave(self) -> None:
        if self._superseded:
            return
        try:
            await self._directory.unregister(self._info)
        except Unavailable as error:
            self._log.warning("could not leave the directory (%s): the lease will end", error.message)


async def _wait(event: asyncio.Event, seconds: float) -> None:
    try:
        async with asyncio.timeout(seconds):
            await event.wait()
    except TimeoutError:
        return
