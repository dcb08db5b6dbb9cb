"""The asyncio face of an engine, whose step loop runs in a thread of its own.

The thread owns the `Engine`; everything else reaches it through an inbox of calls, and it answers with one
``call_soon_threadsafe`` a step. It sleeps while there is no work. Knows no gRPC and no other worker.

Invariant: a request that was added is, whatever happens to its caller, ended and its blocks freed or (exports)
held until `release`.
"""

from __future__ import annotations

import asyncio
import logging
import os
import queue
import sys
import threading
import time
from collections.abc import AsyncGenerator, Callable
from typing import Any, TypeVar, cast

from engine.core import Engine, Reservation, StepResult
from engine.pages_ahead import PagesAhead
from engine.sequence import EngineOutput, EngineRequest
from engine.stats import EngineStats
from splitserve.cluster import WorkerLoad
from splitserve.errors import EngineError, InvalidRequest, Overloaded, SplitServeError, Unavailable
from splitserve.hashing import BlockHash

log = logging.getLogger(__name__)

_JOIN_SECONDS = 60.0
_NICE = 10  # of the step thread: what it shares a core with, the event loop and its transfers, goes first
_T = TypeVar("_T")
_Item = EngineOutput | Reservation | SplitServeError


class AsyncEngine:
    """Serves one `Engine` to coroutines of one event loop. ``working`` is told when its thread finds work and when
    it goes to sleep."""

    def __init__(
        self, engine: Engine, *, max_waiting: int = 256, working: Callable[[bool], None] | None = None
    ) -> None:
        self.engine = engine
        self._max_waiting = max_waiting
        self._working = working or (lambda at_work: None)
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._outputs: dict[str, asyncio.Queue[_Item]] = {}
        self._events_lock = threading.Lock()
        self._changes: dict[BlockHash, bool] = {}  # filled (True) or evicted since they were last taken
        self._calls: set[asyncio.Future[Any]] = set()  # that the thread has not answered yet
        self._adding = 0  # requests that the thread has not yet seen
        self._broken = False
        self._step_began: float | None = None  # of the step under way; written by the thread
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._pages = None if engine.runner.on_gpu else PagesAhead(engine.runner.memory())

    @property
    def stats(self) -> EngineStats:
        return self.engine.stats

    @property
    def num_blocks(self) -> int:
        return self.engine.pool.num_blocks

    @property
    def block_bytes(self) -> int:
        return self.engine.runner.layout.block_bytes

    @property
    def step_seconds(self) -> float:
        """How long the step under way has taken so far; 0 between steps."""
        began = self._step_began
        return 0.0 if began is None else time.monotonic() - began

    async def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._thread.start()
        if self._pages is not None:
            self._pages.start()

    async def close(self) -> None:
        """Ends the thread after its current step; waiting callers get an EngineError. Then asserts that the
        engine's books are in order; raises EngineError if its thread has failed."""
        self._inbox.put(None)
        await asyncio.to_thread(self._thread.join, _JOIN_SECONDS)
        if self._pages is not None:
            await asyncio.to_thread(self._pages.close)
        self._check_thread()
        self.engine.check_integrity()
        for outputs in self._outputs.values():
            outputs.put_nowait(EngineError("the engine was closed"))

    async def generate(self, request: EngineRequest) -> AsyncGenerator[EngineOutput, None]:
        """Outputs of a request until one is finished. Leaving early aborts it.

        Raises InvalidRequest, Overloaded, EngineError or, when no request can be served, Unavailable. An export's
        blocks stay held: call `release`.
        """
        await self._add(request, loads=False)
        try:
            async for output in self._drain(request.request_id):
                yield output
        finally:
            self._forget(request.request_id)

    async def reserve(self, request: EngineRequest) -> Reservation:
        """Waits for blocks for all tokens of ``request``. Then fill them and iterate `generate_loaded`, or call
        `abandon`. Cancelling while waiting gives everything back."""
        await self._add(request, loads=True)
        try:
            item = await self._outputs[request.request_id].get()
            if isinstance(item, SplitServeError):
                raise item
            assert isinstance(item, Reservation)
            return item
        except BaseException:
            self._forget(request.request_id)
            raise

    async def generate_loaded(
        self, request_id: str, num_computed: int, first_token: int | None
    ) -> AsyncGenerator[EngineOutput, None]:
        """Goes on with a reserved request whose first ``num_computed`` tokens have KV now. ``first_token``
        follows the known tokens and is not yielded again."""
        try:
            if await self._call(lambda: self.engine.start_loaded(request_id, num_computed, first_token)):
                async for output in self._drain(request_id):
                    yield output
        finally:
            self._forget(request_id)

    def abandon(self, request_id: str, num_computed: int) -> None:
        """Gives a reservation back; its first ``num_computed`` tokens did arrive and may be cached.
        No byte may be written to its blocks any more."""
        self._outputs.pop(request_id, None)
        self._inbox.put(lambda: self.engine.abort(request_id, loaded_tokens=num_computed))

    def release(self, request_id: str) -> None:
        """Frees the blocks of an export. Whoever still waits for its outputs gets an EngineError."""
        if (outputs := self._outputs.get(request_id)) is not None:
            outputs.put_nowait(EngineError("the request was given up before it was computed"))
        self._inbox.put(lambda: self.engine.release(request_id))

    def let_go(self) -> None:
        """The step under way does not end: whoever waits gets Unavailable. Blocks are freed when it has ended."""
        self._give_up(Unavailable("the engine makes no progress"))

    def take_block_events(self) -> tuple[list[BlockHash], list[BlockHash]]:
        """Hashes of blocks filled and evicted since the last call; the last word on each counts."""
        with self._events_lock:
            changes, self._changes = self._changes, {}
        return [h for h, filled in changes.items() if filled], [h for h, filled in changes.items() if not filled]

    def known_hashes(self) -> list[BlockHash]:
        return self.engine.pool.known_hashes()

    def load(self) -> WorkerLoad:
        """A snapshot; fields are read while the engine works and need not belong to the same step.

        Raises EngineError when the thread has failed: the worker can't go on.
        """
        self._check_thread()
        scheduler, stats = self.engine.scheduler, self.engine.stats
        return WorkerLoad(
            num_running=len(scheduler.running) + len(scheduler.loading),
            num_waiting=len(scheduler.waiting) + self._inbox.qsize(),
            queued_tokens=scheduler.queued_tokens,
            used_blocks=self.engine.pool.num_used,
            prefill_tokens_per_second=stats.prefill_tokens_per_second,
            decode_step_seconds=stats.decode_step_seconds,
            decode_sequence_seconds=stats.decode_sequence_seconds,
        )

    async def check_integrity(self) -> None:
        """Asserts the engine's invariants between two steps."""
        await self._call(self.engine.check_integrity)

    # -- the caller's side ---------------------------------------------------------------------------------

    async def _add(self, request: EngineRequest, *, loads: bool) -> None:
        waiting = len(self.engine.scheduler.waiting) + self._adding
        if waiting >= self._max_waiting:
            raise Overloaded(f"{waiting} requests are waiting on this worker")
        if request.request_id in self._outputs:
            raise InvalidRequest(f"request id {request.request_id} is in use", "request_id")
        self._outputs[request.request_id] = asyncio.Queue()
        self._adding += 1
        try:
            await self._call(lambda: self.engine.add(request, loads=loads))
        except BaseException:
            self._forget(request.request_id)
            raise
        finally:
            self._adding -= 1

    async def _drain(self, request_id: str) -> AsyncGenerator[EngineOutput, None]:
        outputs = self._outputs[request_id]
        while True:
            item = await outputs.get()
            if isinstance(item, SplitServeError):
                raise item
            assert isinstance(item, EngineOutput)
            yield item
            if item.finished:
                return

    def _forget(self, request_id: str) -> None:
        self._outputs.pop(request_id, None)
        self._inbox.put(lambda: self.engine.abort(request_id))

    async def _call(self, function: Callable[[], _T]) -> _T:
        """Runs a function in the engine's thread between two steps; raises what it raises."""
        assert self._loop is not None
        if self._broken:
            raise Unavailable("the engine has failed")
        loop = self._loop
        done: asyncio.Future[_T] = loop.create_future()
        self._calls.add(done)
        done.add_done_callback(self._calls.discard)

        def settle(result: _T | None, error: Exception | None) -> None:
            if done.done():
                return
            if error is not None:
                done.set_exception(error)
            else:
                done.set_result(cast(_T, result))

        def run() -> None:
            try:
                result = function()
            except Exception as error:
                loop.call_soon_threadsafe(settle, None, error)
            else:
                loop.call_soon_threadsafe(settle, result, None)

        self._inbox.put(run)
        return await done

    def _check_thread(self) -> None:
        if self._broken:
            raise EngineError("the engine has failed")

    def _give_up(self, error: SplitServeError) -> None:
        """Whoever waits gets ``error``."""
        for outputs in self._outputs.values():
            outputs.put_nowait(error)
        for call in list(self._calls):
            if not call.done():
                call.set_exception(error)

    # -- the engine's thread -------------------------------------------------------------------------------

    def _run(self) -> None:
        assert self._loop is not None
        try:
            if sys.platform == "linux":  # elsewhere threads have no priority of their own
                os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)
            try:
                self._serve()
            finally:
                self._working(False)
        except Exception:
            log.critical("the engine's thread has failed: this worker can't go on", exc_info=True)
            self._broken = True
            self._loop.call_soon_threadsafe(self._give_up, Unavailable("the engine has failed"))

    def _serve(self) -> None:
        assert self._loop is not None
        stuck = False  # every request waits for blocks that only a call can free
        while self._handle_calls(block=stuck or not self.engine.has_work):
            if not self.engine.has_work:
                continue
            self._working(True)
            try:
                self._step_began = time.monotonic()
                result = self.engine.step()
            except Exception:
                log.exception("a step failed; its requests are computed one by one")
                result = self.engine.step_apart()
            finally:
                self._step_began = None
            stuck = not result.computed and not result.reserved and not result.failed
            if self._pages is not None:
                self._pages.reach(self.engine.pool.reached * self.block_bytes)
            self._take_events()
            self._loop.call_soon_threadsafe(self._deliver, result)

    def _handle_calls(self, block: bool) -> bool:
        """Runs what came in; with ``block`` sleeps until something does. False: time to end."""
        if block:
            self._working(False)
        while True:
            try:
                call = self._inbox.get(block=block)
            except queue.Empty:
                return True
            if call is None:
                return False
            call()
            self._take_events()
            block = False

    def _take_events(self) -> None:
        events = self.engine.take_events()
        if events:
            with self._events_lock:
                self._changes.update(events)

    def _deliver(self, result: StepResult) -> None:
        items: list[tuple[str, _Item]] = [(r.request_id, r) for r in result.reserved]
        items += result.outputs
        items += result.failed
        for request_id, item in items:
            if (outputs := self._outputs.get(request_id)) is not None:
                outputs.put_nowait(item)
