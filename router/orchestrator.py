"""A request's way through the two pools: plan, prefill leg, decode leg, and what to do when a leg breaks.

Owns the order of events of one request; knows no text, no HTTP and no routing rule. The client's tokens are the
only state: whatever breaks, the request goes on elsewhere from prompt + tokens already given out.
Invariant: each token index is given out once, in order; leaving the generator ends the work on every worker.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import AsyncExitStack, aclosing, contextmanager

from router.backend import GenerationChunk, GenerationRequest, ModelSpec
from router.breaker import Incarnation, Trouble
from router.legs import Channels, DecodeLeg, Handle, PrefillLeg, open_decode, open_prefill
from router.planner import Planner
from router.policy import Plan
from router.retry_budget import RetryBudget
from router.snapshot import ClusterView
from splitserve.cluster import WorkerState
from splitserve.errors import (
    DeadlineExceeded,
    EngineError,
    Incompatible,
    Overloaded,
    PeerLost,
    SplitServeError,
    TransferFailed,
    Unavailable,
)
from splitserve.logs import ContextLogger, request_logger
from splitserve.metrics import RouterMetrics
from splitserve.sequences import SequenceRequest

log = logging.getLogger(__name__)

_RETRIED = (Unavailable, Overloaded, Incompatible, EngineError)


class LegFailed(Exception):
    """A leg broke in a way that another worker may not."""

    def __init__(self, leg: str, worker: WorkerState, error: SplitServeError) -> None:
        super().__init__(f"{leg} on {worker.info.id}: {error}")
        self.leg = leg
        self.worker = worker
        self.error = error


class Orchestrator:
    def __init__(
        self,
        planner: Planner,
        view: ClusterView,
        channels: Channels,
        metrics: RouterMetrics,
        max_retries: int,
        budget: RetryBudget,
    ) -> None:
        self._planner = planner
        self._view = view
        self._channels = channels
        self._metrics = metrics
        self._max_retries = max_retries
        self._budget = budget

    async def generate(self, request: GenerationRequest, spec: ModelSpec) -> AsyncGenerator[GenerationChunk, None]:
        """Raises what no other worker can mend, the last failure when the retries of this request are used up, or
        Unavailable when those of all requests are."""
        logger = request_logger(log, request.request_id)
        now = asyncio.get_running_loop().time
        given: list[int] = []
        excluded: set[Incarnation] = set()
        retries = 0
        last: LegFailed | None = None
        while True:
            sequence = _sequence(request, spec, given, retries)
            try:
                plan = await self._planner.plan(request, spec, sequence.tokens, excluded)
            except SplitServeError as error:
                if last is None:
                    raise
                raise last.error from error  # that no other worker is left says less than why this one failed
            sent = now()
            if last is None:
                self._budget.note_request(sent)
            try:
                async with aclosing(self._attempt(plan, request, sequence, logger)) as chunks:
                    async for chunk in chunks:
                        given += [token.token for token in chunk.tokens]
                        yield chunk
                return
            except LegFailed as failure:
                retries, last = retries + 1, failure
                moves = self._note(failure, sent, excluded)
                if retries > self._max_retries:
                    raise failure.error from failure
                self._spend(failure, moves, request.model)
                self._metrics.observe_retry(request.model, failure.leg)
                logger.warning("%s; going on elsewhere", failure, extra={"given": len(given)})

    async def _attempt(
        self, plan: Plan, request: GenerationRequest, sequence: SequenceRequest, logger: ContextLogger
    ) -> AsyncGenerator[GenerationChunk, None]:
        """The request on the planned workers, from the first token that ``sequence`` lacks."""
        logger.info("planned", extra=plan.describe())
        sent = asyncio.get_running_loop().time()
        async with AsyncExitStack() as legs:
            prefill = handle = None
            sound = False
            more = not _ends_with_next(sequence)
            if plan.prefill is not None:
                with _failing("prefill", plan.prefill):
                    prefill = await self._open_prefill(legs, plan.prefill, plan, request, sequence)
                    handle = await prefill.handle() if more else None
            if prefill is None or more:
                decode = await self._open_decode(legs, plan, request, sequence, handle)
            if prefill is not None and plan.prefill is not None:
                with _failing("prefill", plan.prefill):
                    first = await prefill.first_token()
                yield GenerationChunk((first.token,), first.cached_tokens, prefill_worker=plan.prefill.info.id)
                if first.token.finish_reason is not None:
                    self._view.breakers.succeeded(plan.prefill.info, sent)
                    return
            with _failing("decode", plan.decode, plan.prefill):
                async for chunk in _decoded(decode, plan, is_start=prefill is None and not _given(sequence)):
                    if not sound:
                        sound = self._note_success(plan, sent)
                    yield chunk

    async def _open_prefill(
        self,
        legs: AsyncExitStack,
        worker: WorkerState,
        plan: Plan,
        request: GenerationRequest,
        sequence: SequenceRequest,
    ) -> PrefillLeg:
        legs.enter_context(self._view.begin(worker, plan.uncached_prefill))
        return await legs.enter_async_context(
            open_prefill(self._channels, worker.info, sequence, _remaining(request))
        )

    async def _open_decode(
        self,
        legs: AsyncExitStack,
        plan: Plan,
        request: GenerationRequest,
        sequence: SequenceRequest,
        handle: Handle | None,
    ) -> DecodeLeg:
        info = plan.decode.info
        legs.enter_context(self._view.begin(plan.decode, plan.uncached_decode, plan.decode_blocks))
        return await legs.enter_async_context(
            open_decode(self._channels, info, sequence, handle, _remaining(request))
        )

    def _note(self, failure: LegFailed, sent: float, excluded: set[Incarnation]) -> bool:
        """Keeps this request off the worker, and others too if the worker itself is in trouble. True if it is
        lost with all that had been sent there: such a request moves, and need not ask the budget."""
        info = failure.worker.info
        excluded.add((info.id, info.epoch))
        trouble = _trouble(failure.error)
        return trouble is not None and self._view.breakers.failed(
            info, trouble, asyncio.get_running_loop().time(), sent
        )

    def _note_success(self, plan: Plan, sent: float) -> bool:
        for worker in plan.workers:
            self._view.breakers.succeeded(worker.info, sent)
        return True

    def _spend(self, failure: LegFailed, moves: bool, model: str) -> None:
        """Raises Unavailable when retries have added enough load. The workers lost with the requests on them bear
        none: these go on in any case."""
        now = asyncio.get_running_loop().time()
        if moves:
            self._budget.note_move(now)
        elif not self._budget.take(now):
            self._metrics.observe_retry_refused(model)
            if isinstance(failure.error, Overloaded):
                raise failure.error from failure
            raise Unavailable("too many requests fail for this one to be tried again") from failure


def _trouble(error: SplitServeError) -> Trouble | None:
    """What a failed leg says of its worker."""
    match error:
        case Overloaded():
            return None
        case PeerLost() | TransferFailed(reason="peer_lost"):  # of both, the transfer's connection may break first
            return Trouble.GONE
        case TransferFailed(reason="connect"):  # it may have ended before the transfer began
            return Trouble.DOWN
        case TransferFailed():
            return Trouble.FAILED
        case Unavailable():
            return Trouble.DOWN
        case _:
            return Trouble.FAILED


@contextmanager
def _failing(leg: str, worker: WorkerState, source: WorkerState | None = None) -> Iterator[None]:
    """Turns what another worker may do better into LegFailed. A failed transfer is the ``source``'s fault."""
    try:
        yield
    except TransferFailed as error:
        raise LegFailed("transfer", source or worker, error) from error
    except _RETRIED as error:
        raise LegFailed(leg, worker, error) from error


async def _decoded(leg: DecodeLeg, plan: Plan, *, is_start: bool) -> AsyncIterator[GenerationChunk]:
    """``is_start``: the first chunk begins the answer, and what it says of the prompt is worth telling."""
    worker = plan.decode.info.id
    async for tokens in leg.tokens():
        if is_start:
            yield GenerationChunk(
                tokens.tokens, tokens.cached_tokens, tokens.prompt_logprobs or None, decode_worker=worker
            )
            is_start = False
        else:
            yield GenerationChunk(tokens.tokens, decode_worker=worker)
        if tokens.tokens and tokens.tokens[-1].finish_reason is not None:
            return
    raise Unavailable("the decode worker ended the stream early")


def _sequence(request: GenerationRequest, spec: ModelSpec, given: list[int], retries: int) -> SequenceRequest:
    """A retry has an id of its own: the worker may still hold what was left of the attempt before it."""
    return SequenceRequest(
        request_id=f"{request.request_id}.{retries}" if retries else request.request_id,
        fingerprint=spec.fingerprint,
        tokens=[*request.prompt_tokens, *given],
        num_prompt=len(request.prompt_tokens),
        params=request.sampling,
        salt=request.cache_salt,
    )


def _given(sequence: SequenceRequest) -> int:
    return len(sequence.tokens) - sequence.num_prompt


def _ends_with_next(sequence: SequenceRequest) -> bool:
    """Whether the next token is the last one that was asked for, so that nothing is left to decode."""
    return sequence.params.max_tokens is not None and _given(sequence) + 1 >= sequence.params.max_tokens


def _remaining(request: GenerationRequest) -> float | None:
    """Seconds that are left for the request. Raises DeadlineExceeded when there are none."""
    if request.deadline is None:
        return None
    remaining = request.deadline - asyncio.get_running_loop().time()
    if remaining <= 0:
        raise DeadlineExceeded("the request's time is over")
    return remaining
