"""One engine: schedule, run, sample, account. Synchronous, and used from one thread at a time.

Knows requests, blocks and tokens; not who asks, and not that prefill and decode may live on different workers.
Invariant: after `step` every request is waiting, loading, running, held for its exporter, or gone with its
blocks (`check_integrity`).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable
from dataclasses import dataclass

from engine.block_pool import BlockPool
from engine.config import EngineConfig
from engine.runner import Launched, Runner
from engine.sampler import Sampled, drawable
from engine.scheduler import Scheduled, Scheduler
from engine.sequence import EngineOutput, EngineRequest, Sequence, Status
from engine.stats import EngineStats
from engine.weights import ModelFiles
from splitserve.errors import DeadlineExceeded, EngineError, InvalidRequest, SplitServeError
from splitserve.hashing import BlockHash, PrefixHasher
from splitserve.sampling import TokenOutput

log = logging.getLogger(__name__)

Outputs = list[tuple[str, EngineOutput]]  # by request id
Failures = list[tuple[str, SplitServeError]]  # by request id


@dataclass(frozen=True, slots=True)
class Reservation:
    """Blocks for a request whose KV comes from elsewhere."""

    request_id: str
    blocks: tuple[int, ...]  # block table for all known tokens
    cached_tokens: int  # leading tokens that are in the pool already; the blocks behind are to be filled


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a step did: outputs by request id, blocks for reservations, requests that ended with an error."""

    computed: bool  # whether any row was
    outputs: Outputs
    reserved: list[Reservation]
    failed: Failures


@dataclass(frozen=True, slots=True)
class _Flight:
    """A step under way."""

    scheduled: list[Scheduled]
    launched: Launched
    start: float


class Engine:
    def __init__(self, config: EngineConfig, files: ModelFiles, runner: Runner | None = None) -> None:
        self.config = config
        self.runner = runner or Runner(config, files)
        self.pool = BlockPool(self.runner.num_blocks, caching=config.enable_prefix_caching)
        self.scheduler = Scheduler(
            self.pool,
            block_tokens=config.block_tokens,
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
        )
        self.stats = EngineStats()
        self.vocab_size = files.config.vocab_size
        self.max_model_len = self.runner.max_model_len
        self._eos_ids = frozenset(files.config.eos_token_ids)
        self._sequences: dict[str, Sequence] = {}
        self._flight: _Flight | None = None
        self._reserved: list[Reservation] = []  # not yet told
        self._late: Failures = []  # not yet told
        self._begun: list[Scheduled] = []  # what the newest step computes
        self._collected = 0.0  # when the last step was

    @property
    def max_sequence_tokens(self) -> int:
        """Tokens that the whole pool holds."""
        return self.runner.num_blocks * self.config.block_tokens

    @property
    def has_work(self) -> bool:
        return bool(self.scheduler.running or self.scheduler.waiting or self._flight)

    def warm_up(self) -> None:
        speed = self.runner.warm_up(self.config.max_num_batched_tokens)
        self.stats.prefill_tokens_per_second = speed

    def validate(self, request: EngineRequest) -> None:
        """Raises InvalidRequest for what this engine could never finish."""
        known, params = len(request.tokens), request.params
        num_prompt = known if request.num_prompt is None else request.num_prompt
        if not 0 < num_prompt <= known:
            raise InvalidRequest("the prompt must have at least one token", "prompt")
        if not all(0 <= token < self.vocab_size for token in request.tokens):
            raise InvalidRequest(f"token ids must be below the vocabulary size {self.vocab_size}", "prompt")
        if known >= self.max_model_len:
            raise InvalidRequest(
                f"the prompt has {known} tokens, the model's context is {self.max_model_len}", "prompt"
            )
        generated = 1 if request.export or params.max_tokens is None else params.max_tokens
        if num_prompt + generated > self.max_model_len:
            raise InvalidRequest(
                f"prompt ({num_prompt} tokens) and max_tokens ({generated}) exceed the model's context of "
                f"{self.max_model_len} tokens",
                "max_tokens",
            )
        most = max(known, num_prompt + generated - 1)  # the last token needs no KV
        if most > self.max_sequence_tokens:
            raise InvalidRequest(
                f"the request may need KV for {most} tokens, this worker's pool holds {self.max_sequence_tokens}",
                "max_tokens",
            )
        if any(token >= self.vocab_size for token in (*params.logit_bias, *params.stop_token_ids)):
            raise InvalidRequest(f"token ids must be below the vocabulary size {self.vocab_size}", "logit_bias")

    def add(self, request: EngineRequest, *, loads: bool = False) -> None:
        """Queues a request; with ``loads`` it first gets a `Reservation` and waits for `start_loaded`."""
        self.validate(request)
        if request.request_id in self._sequences:
            raise InvalidRequest(f"request id {request.request_id} is in use", "request_id")
        hasher = PrefixHasher(self.runner.fingerprint, request.salt)
        sequence = Sequence.from_request(request, self._eos_ids, self.max_model_len, hasher, loads=loads)
        self._sequences[sequence.id] = sequence
        self.scheduler.add(sequence)

    def start_loaded(self, request_id: str, num_computed: int, first_token: int | None) -> bool:
        """The reserved blocks are filled up to ``num_computed`` tokens, and this token follows the known ones.
        False if the answer ends with it."""
        sequence = self._sequences[request_id]
        if first_token is not None:
            sequence.append(first_token)
        self.scheduler.start_loaded(sequence, min(num_computed, len(sequence.tokens) - 1))
        if sequence.finish_reason is not None:
            self._remove(sequence)
            return False
        return True

    def abort(self, request_id: str, *, loaded_tokens: int | None = None) -> None:
        """Ends a request; nothing happens if it is gone. An export that has blocks keeps them until `release`.
        ``loaded_tokens``: so many tokens of a reservation did arrive, and may be cached."""
        sequence = self._sequences.get(request_id)
        if sequence is None:
            return
        if sequence.export and sequence.status is Status.RUNNING:
            self.scheduler.hold(sequence)
        elif not (sequence.export and sequence.status is Status.HELD):
            if loaded_tokens is not None and sequence.status is Status.LOADING:
                assert loaded_tokens <= len(sequence.tokens)
                self.scheduler.advance(sequence, loaded_tokens)
            self._remove(sequence)

    def release(self, request_id: str) -> None:
        """Frees the blocks of an export."""
        sequence = self._sequences.get(request_id)
        if sequence is not None:
            self._remove(sequence)

    def step(self) -> StepResult:
        """Collects one step. On a device with a queue the next one is launched before that."""
        flight = self._flight or self._launch(None)
        self._flight = None
        outputs: Outputs = []
        failed: Failures = []
        if flight is not None:
            if self._may_run_ahead(flight):
                self._flight = self._launch(flight)
            outputs, failed = self._collect(flight)
        reserved, self._reserved = self._reserved, []
        late, self._late = self._late, []
        return StepResult(flight is not None, outputs, reserved, late + failed)

    def step_apart(self) -> StepResult:
        """After a step that could not be computed: its requests one by one, so that only those fail that fail
        alone. KV that was written before is written again."""
        begun, self._begun = self._begun, []
        if not begun or self._flight is not None or self.runner.runs_ahead:
            return StepResult(False, [], [], self._fail_running())
        outputs: Outputs = []
        failed: Failures = []
        for item in begun:
            sequence = item.sequence
            if not sequence.in_flight:
                self.scheduler.start(item)
            try:
                some, none = self._collect(_Flight([item], self.runner.launch([item]), time.monotonic()))
                outputs += some
                failed += none
            except Exception:
                log.exception("a request can't be computed and is given up", extra={"request_id": sequence.id})
                if sequence.in_flight:
                    self.scheduler.settle(item)
                self._remove(sequence)
                failed.append((sequence.id, EngineError("the engine could not compute this request")))
        return StepResult(True, outputs, [], failed)

    def _fail_running(self) -> Failures:
        """Raises what the device does if it computes no more."""
        self.runner.wait()  # or steps under way would write to blocks that are given to others
        self._flight = None
        self.scheduler.settle_all()
        ids = [s.id for s in self.scheduler.running]
        for request_id in ids:
            self._remove(self._sequences[request_id])
        return [(request_id, EngineError("the engine could not compute this step")) for request_id in ids]

    def _may_run_ahead(self, flight: _Flight) -> bool:
        """Whether the next step needs nothing that only the end of this one will tell."""
        return (
            self.runner.runs_ahead
            and (flight.launched.drawn is not None or not flight.launched.sequences)
            and self.scheduler.may_run_ahead
            and all(drawable(s) for s in self.scheduler.running)
        )

    def _launch(self, before: _Flight | None) -> _Flight | None:
        start = time.monotonic()
        self._begun = []
        for sequence in self.scheduler.late(start):
            self._remove(sequence)
            self._late.append((sequence.id, DeadlineExceeded("the request's time was over before it was begun")))
        scheduled, loading = self.scheduler.schedule()
        for sequence in (*loading, *(item.sequence for item in scheduled)):
            self._note_first_step(sequence, start)
        self._reserved += [Reservation(s.id, tuple(s.blocks), s.num_cached) for s in loading]
        if not scheduled:
            return None
        self._begun = scheduled
        launched = self.runner.launch(scheduled, before.launched if before else None)
        for item in scheduled:
            self.scheduler.start(item)
        return _Flight(scheduled, launched, start)

    def _collect(self, flight: _Flight) -> tuple[Outputs, Failures]:
        sampled = dict(zip(flight.launched.sequences, self.runner.collect(flight.launched), strict=True))
        now = time.monotonic()
        self._record(flight.scheduled, now - max(flight.start, self._collected))
        self._collected = now
        outputs: Outputs = []
        failed: Failures = []
        for item in flight.scheduled:
            sequence = item.sequence
            self.scheduler.settle(item)
            if sequence.status is not Status.RUNNING:  # ended while the step was under way
                continue
            token = sampled.get(sequence)
            if item.samples and token is None:  # nothing of this step may enter the prefix cache
                failed.append((sequence.id, EngineError("the model's output is not finite for this request")))
                self._remove(sequence)
                continue
            self.scheduler.advance(sequence, item.end)
            if token is not None or sequence.export:
                outputs.append((sequence.id, self._output(item, token)))
        return outputs, failed

    def take_events(self) -> dict[BlockHash, bool]:
        """Blocks filled (True) and evicted (False) since the last call."""
        return self.pool.take_events()

    def check_integrity(self) -> None:
        self.scheduler.check_integrity()
        in_scheduler = [*self.scheduler.waiting, *self.scheduler.running]
        in_scheduler += [*self.scheduler.loading, *self.scheduler.held]
        assert sorted(s.id for s in in_scheduler) == sorted(self._sequences)

    def _output(self, item: Scheduled, sampled: Sampled | None) -> EngineOutput:
        sequence = item.sequence
        tokens: tuple[TokenOutput, ...] = ()
        finished = False
        if sampled is not None:
            token, logprobs = sampled
            sequence.append(token)
            tokens = (TokenOutput(sequence.num_generated - 1, token, logprobs, sequence.finish_reason),)
            self.stats.generated_tokens += 1
            finished = sequence.export or sequence.finish_reason is not None
        first = sequence.num_generated <= 1 or sequence.export
        output = EngineOutput(
            tokens=tokens,
            num_computed=item.end,
            blocks=tuple(sequence.blocks) if sequence.export else (),
            cached_tokens=sequence.num_cached,
            prompt_logprobs=tuple(sequence.prompt_logprobs) if first and sequence.prompt_logprobs else None,
            queue_seconds=sequence.queue_seconds,
            finished=finished,
        )
        if finished and sequence.export:
            self.scheduler.hold(sequence)
        elif finished:
            self._remove(sequence)
        return output

    def _note_first_step(self, sequence: Sequence, now: float) -> None:
        if sequence.first_step is None:
            sequence.first_step = now
            self.stats.prompt_tokens += len(sequence.tokens)
            self.stats.cached_tokens += sequence.num_cached

    def _record(self, scheduled: Iterable[Scheduled], seconds: float) -> None:
        rows = [item.num_tokens for item in scheduled]
        self.stats.preemptions = self.scheduler.num_preemptions
        self.stats.record_step(sum(n for n in rows if n > 1), sum(n == 1 for n in rows), seconds)

    def _remove(self, sequence: Sequence) -> None:
        self.scheduler.finish(sequence)
        del self._sequences[sequence.id]
