"""Modelled workers: a queue that computes prompts, and a batch that generates.

A prefill worker computes one prompt after the other. All running sequences of a decode worker advance by one token
a step; a step takes longer the more there are, so their common progress is integrated piecewise: ``_progress`` is
how many tokens a sequence that was there from the start would have. Invariant: a decode worker never holds more
blocks than its pool has, nor more sequences than it may run; what does not fit waits in order.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from bench.sim.cache import Index, PrefixCache
from bench.sim.clock import Clock
from bench.sim.model import BLOCK_TOKENS, Hardware, Request


@dataclass(slots=True, eq=False)
class Job:
    """A request on its way. ``counted``: the tokens that a queue still counts for it."""

    request: Request
    done: Callable[[], None]
    counted: int = 0
    cached: int = 0  # tokens found in the cache when its computing began
    began: float = 0.0


class PrefillWorker:
    """Computes prompts in order of arrival."""

    def __init__(self, number: int, hardware: Hardware, clock: Clock, index: Index) -> None:
        self.number = number
        self.cache = PrefixCache(number, hardware.pool_blocks, index)
        self.busy_seconds = 0.0
        self.queued_tokens = 0  # of jobs that wait or are being computed
        self._hardware = hardware
        self._clock = clock
        self._jobs: deque[Job] = deque()
        self._job_ends = 0.0
        self._link_free = 0.0

    @property
    def busy_so_far(self) -> float:
        """Seconds of computing until now."""
        return self.busy_seconds - max(0.0, self._job_ends - self._clock.now)

    @property
    def waiting(self) -> int:
        return max(0, len(self._jobs) - 1)

    @property
    def running(self) -> int:
        return min(1, len(self._jobs))

    def submit(self, job: Job) -> None:
        job.counted = max(1, job.request.input_tokens - self.cache.match(job.request.blocks) * BLOCK_TOKENS)
        self.queued_tokens += job.counted
        self._jobs.append(job)
        if len(self._jobs) == 1:
            self._begin()

    def sent(self, job: Job, missing_blocks: int) -> float:
        """When the last of ``missing_blocks`` has reached the decode worker, if the prompt is computed now.

        Blocks travel while later ones are computed, in order behind earlier transfers on this worker's link;
        one block at least is sent after the end.
        """
        block_seconds = BLOCK_TOKENS * self._hardware.kv_bytes_per_token / self._hardware.link_bytes_per_second
        streamed = max(self._link_free, job.began) + missing_blocks * block_seconds
        arrived = max(streamed, self._clock.now + min(1, missing_blocks) * block_seconds)
        self._link_free = max(self._link_free, streamed)
        return arrived

    def _begin(self) -> None:
        job = self._jobs[0]
        tokens = job.request.input_tokens
        job.cached = min(self.cache.match(job.request.blocks) * BLOCK_TOKENS, tokens - 1)
        job.began = self._clock.now
        seconds = self._hardware.prefill_seconds(job.cached, tokens)
        self.busy_seconds += seconds
        self._job_ends = self._clock.now + seconds
        self._clock.after(seconds, self._finish)

    def _finish(self) -> None:
        job = self._jobs.popleft()
        self.queued_tokens -= job.counted
        self.cache.store(job.request.blocks)
        if self._jobs:
            self._begin()
        job.done()


class DecodeWorker:
    """Generates for many requests at once."""

    def __init__(self, number: int, hardware: Hardware, clock: Clock, index: Index) -> None:
        self.number = number
        self.cache = PrefixCache(number, hardware.pool_blocks, index)
        self.used_blocks = 0
        self.queued_tokens = 0  # of prompts that are being computed here
        self.block_seconds = 0.0  # integral of used_blocks
        self._hardware = hardware
        self._clock = clock
        self._waiting: deque[Job] = deque()
        self._running: list[tuple[float, int, Job]] = []  # heap: progress at which it ends, serial
        self._serial = 0
        self._kv_tokens = 0
        self._progress = 0.0
        self._since = 0.0  # up to when progress is counted; later than now while a prompt is computed here
        self._used_since = 0.0
        self._version = 0

    @property
    def running(self) -> int:
        return len(self._running)

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def held_so_far(self) -> float:
        """Blocks held, integrated over time until now."""
        return self.block_seconds + self.used_blocks * (self._clock.now - self._used_since)

    @property
    def step_seconds(self) -> float:
        return self._hardware.step_seconds(len(self._running), self._kv_tokens)

    def submit(self, job: Job) -> None:
        """Admits the request, or lets it wait for room. Its prompt's KV is here."""
        self._waiting.append(job)
        self._admit()

    def compute(self, job: Job, first_token: Callable[[], None]) -> None:
        """Computes a prompt here: everyone waits for it, then generates."""
        cached = min(self.cache.match(job.request.blocks) * BLOCK_TOKENS, job.request.input_tokens - 1)
        job.cached = cached
        seconds = self._hardware.prefill_seconds(cached, job.request.input_tokens)
        job.counted = job.request.input_tokens - cached
        self.queued_tokens += job.counted
        self._advance()
        self._since = max(self._since, self._clock.now) + seconds
        self._schedule()

        def computed() -> None:
            self.queued_tokens -= job.counted
            first_token()
            self.submit(job)

        self._clock.at(self._since, computed)

    def _admit(self) -> None:
        self._advance()
        while self._waiting and len(self._running) < self._hardware.max_num_seqs:
            job = self._waiting[0]
            blocks = job.request.held_blocks
            if self.used_blocks + blocks > self._hardware.pool_blocks:
                break
            self._waiting.popleft()
            self._hold(blocks)
            self.cache.store(job.request.blocks, self._hardware.pool_blocks - self.used_blocks)
            self._kv_tokens += job.request.input_tokens + job.request.output_tokens // 2
            self._serial += 1
            # the first token is there already
            heapq.heappush(self._running, (self._progress + job.request.output_tokens - 1, self._serial, job))
        self._schedule()

    def _advance(self) -> None:
        if self._clock.now > self._since:
            if self._running:
                self._progress += (self._clock.now - self._since) / self.step_seconds
            self._since = self._clock.now

    def _schedule(self) -> None:
        self._version += 1
        if self._running:
            left = max(0.0, self._running[0][0] - self._progress)
            version = self._version
            self._clock.at(self._since + left * self.step_seconds, lambda: self._end(version))

    def _end(self, version: int) -> None:
        if version != self._version:
            return  # the batch has changed since, and with it the time
        self._advance()
        end, _, job = heapq.heappop(self._running)
        self._progress = max(self._progress, end)
        self._hold(-job.request.held_blocks)
        self._kv_tokens -= job.request.input_tokens + job.request.output_tokens // 2
        self._admit()
        job.done()

    def _hold(self, blocks: int) -> None:
        self.block_seconds += self.used_blocks * (self._clock.now - self._used_since)
        self._used_since = self._clock.now
        self.used_blocks += blocks
        assert 0 <= self.used_blocks <= self._hardware.pool_blocks
