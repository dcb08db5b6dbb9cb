"""Answers as text: what a backend's tokens mean to a reader.

Owns detokenisation, stop strings, counts and timings of running answers; knows neither HTTP nor gRPC, only
``router.backend``. Invariant: leaving ``Answers`` closes every backend generator that it opened, on all paths,
before the ``async with`` ends.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Self

from router.backend import Backend, GenerationChunk, GenerationRequest, ModelSpec
from router.observer import RequestObserver
from splitserve.errors import EngineError, SplitServeError
from splitserve.sampling import FinishReason, Logprobs, TokenOutput
from splitserve.text import IncrementalDetokenizer, StopStrings

MAX_WAITING_PIECES = 256  # of all answers of one request; a slow reader slows its answers down


@dataclass(frozen=True, slots=True)
class Piece:
    """Text that became certain, and the tokens that came with it. Text may lag behind the tokens."""

    index: int  # which answer
    text: str
    tokens: tuple[TokenOutput, ...]
    offsets: tuple[int, ...]  # of each token's text in the answer, in characters
    prompt_logprobs: tuple[Logprobs, ...] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None  # the stop token or string that ended the answer


class Answer:
    """One answer to one prompt.

    Args:
        arrived: when the client's request came, in the time of the event loop.
    """

    def __init__(
        self,
        backend: Backend,
        spec: ModelSpec,
        request: GenerationRequest,
        index: int,
        arrived: float,
        observer: RequestObserver,
    ) -> None:
        self.request = request
        self.completion_tokens = 0
        self.cached_tokens = 0
        self._backend = backend
        self._spec = spec
        self._index = index
        self._last = self._arrived = arrived
        self._observer = observer
        self._detokenizer = IncrementalDetokenizer(spec.tokenizer, request.prompt_tokens[-8:])
        self._stops = StopStrings(request.sampling.stop)
        self._chars = 0  # of text that the detokenizer gave

    async def pieces(self) -> AsyncGenerator[Piece, None]:
        """Ends with the piece that carries a finish reason. Raises ``SplitServeError``."""
        model = self._spec.name
        self._observer.request_started(model)
        try:
            async with aclosing(self._backend.generate(self.request)) as chunks:
                async for chunk in chunks:
                    piece = self._read(chunk)
                    if piece.finish_reason is not None:
                        self._observe_end(piece.finish_reason)
                    yield piece
                    if piece.finish_reason is not None:
                        return
            raise EngineError("the answer broke off without a finish reason")
        except SplitServeError as error:
            self._observer.observe_failure(model, type(error).__name__)
            raise
        finally:
            self._observer.request_ended(model)

    def _read(self, chunk: GenerationChunk) -> Piece:
        self._observe_tokens(len(chunk.tokens))
        if chunk.cached_tokens is not None:
            self.cached_tokens = chunk.cached_tokens
        text, offsets = "", []
        reason: FinishReason | None = None
        stop_reason: int | str | None = None
        for token in chunk.tokens:
            offsets.append(self._chars)
            self.completion_tokens += 1
            text += self._text_of(token)
            reason = token.finish_reason
            if self._stops.matched is not None:
                reason, stop_reason = FinishReason.STOP, self._stops.matched
            elif reason is FinishReason.STOP and token.token in self.request.sampling.stop_token_ids:
                stop_reason = token.token
            if reason is not None:
                break
        return Piece(
            self._index,
            text,
            chunk.tokens[: len(offsets)],
            tuple(offsets),
            chunk.prompt_logprobs,
            reason,
            stop_reason,
        )

    def _text_of(self, token: TokenOutput) -> str:
        """What may be shown after ``token``. The token that stops an answer is not a part of its text."""
        new = "" if token.finish_reason is FinishReason.STOP else self._detokenizer.push(token.token)
        if token.finish_reason is not None:
            new += self._detokenizer.flush()
        self._chars += len(new)
        shown = self._stops.push(new, check=self.completion_tokens > self.request.sampling.min_tokens)
        if token.finish_reason is not None and self._stops.matched is None:
            shown += self._stops.flush()
        return shown

    def _observe_tokens(self, count: int) -> None:
        if not count:
            return
        now = asyncio.get_running_loop().time()
        if self.completion_tokens == 0:
            self._observer.observe_first_token(self._spec.name, now - self._arrived)
        else:
            self._observer.observe_inter_token(self._spec.name, now - self._last, count)
        self._last = now

    def _observe_end(self, reason: FinishReason) -> None:
        self._observer.observe_success(
            self._spec.name,
            reason,
            self._last - self._arrived,
            len(self.request.prompt_tokens),
            self.completion_tokens,
        )


class Answers:
    """Several answers running at once, as one sequence of pieces in order of arrival."""

    def __init__(self, answers: Sequence[Answer]) -> None:
        self._answers = answers
        self._generators = [answer.pieces() for answer in answers]
        self._tasks: list[asyncio.Task[None]] = []
        self._waiting: deque[Piece] = deque()
        self._arrived = asyncio.Event()
        self._taken = asyncio.Event()

    async def __aenter__(self) -> Self:
        if len(self._generators) > 1:
            self._tasks = [asyncio.create_task(self._run(pieces)) for pieces in self._generators]
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for generator in self._generators:
            await generator.aclose()

    async def next(self) -> Sequence[Piece]:
        """Pieces that are there, at least one; none when all answers have ended. Raises ``SplitServeError``."""
        if not self._tasks:
            return [piece] if (piece := await anext(self._generators[0], None)) is not None else []
        while not self._waiting:
            if all(task.done() for task in self._tasks):
                self._raise_failure()
                return []
            await self._arrived.wait()
            self._arrived.clear()
            self._raise_failure()
        pieces = list(self._waiting)
        self._waiting.clear()
        self._taken.set()
        return pieces

    async def _run(self, pieces: AsyncGenerator[Piece, None]) -> None:
        try:
            async for piece in pieces:
                self._waiting.append(piece)
                self._arrived.set()
                while len(self._waiting) >= MAX_WAITING_PIECES:
                    self._taken.clear()
                    await self._taken.wait()
        finally:
            self._arrived.set()

    def _raise_failure(self) -> None:
        for task in self._tasks:
            if task.done() and not task.cancelled() and (error := task.exception()) is not None:
                raise error

    @property
    def completion_tokens(self) -> int:
        return sum(answer.completion_tokens for answer in self._answers)
