"""``POST /v1/completions``: prompts continued, in OpenAI's shapes.

Invariant: streamed texts of one choice, joined, are the text that the plain answer would hold.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from typing import Any

import orjson
from fastapi import APIRouter, Request, Response

from router.admission import Prompt, text_prompt, token_prompt
from router.answers import Piece
from router.backend import ModelSpec
from router.http.completion_logprobs import CompletionLogprobs
from router.http.routing import JsonRoute
from router.http.schemas import CompletionRequest
from router.http.service import Exchange, GenerationService
from router.http.sse import DONE, EventStream, event, until_disconnect, within
from splitserve.errors import InvalidRequest

DEFAULT_MAX_TOKENS = 16


def completion_routes(service: GenerationService) -> APIRouter:
    """The endpoint, bound to ``service``."""
    router = APIRouter(route_class=JsonRoute)

    @router.post("/v1/completions", summary="Continue prompts")
    async def completions(request: Request, body: CompletionRequest) -> Response:
        arrived = asyncio.get_running_loop().time()
        include_usage = body.include_usage
        deadline = service.deadline(request)
        spec = await service.find_model(body.model)
        fields = _sampling_fields(body)
        async with within(deadline):
            prompts = await _prompts(service, spec, body)
        exchange = service.exchange(
            request,
            body,
            spec,
            prompts,
            fields,
            default_max_tokens=DEFAULT_MAX_TOKENS,
            prefix="cmpl",
            field="prompt",
            arrived=arrived,
            deadline=deadline,
        )
        writers = [_Writer(exchange, body, index) for index in range(len(exchange.answers))]
        if body.stream:
            return EventStream(_events(exchange, writers, include_usage, body.continuous_usage), deadline)
        return await until_disconnect(request.receive, _whole(exchange, writers))

    return router


async def _prompts(service: GenerationService, spec: ModelSpec, body: CompletionRequest) -> Sequence[Prompt]:
    items = _items(body.prompt)
    if not items:
        raise InvalidRequest("prompt must not be empty", "prompt")
    config = service.config
    if len(items) > config.max_prompts or len(items) * body.choices > config.max_choices:
        raise InvalidRequest(
            f"at most {config.max_prompts} prompts and {config.max_choices} answers in one request, "
            f"got {len(items)} prompts with n={body.choices}",
            "prompt",
        )
    special = body.add_special_tokens is not False
    return [
        await text_prompt(spec, item, special) if isinstance(item, str) else token_prompt(spec, item)
        for item in items
    ]


def _items(prompt: str | list[str] | list[int] | list[list[int]]) -> Sequence[str | list[int]]:
    """One or several prompts as a list. A list of numbers is one prompt."""
    if isinstance(prompt, str):
        return [prompt]
    numbers = [item for item in prompt if isinstance(item, int)]
    return [numbers] if numbers else [item for item in prompt if not isinstance(item, int)]


def _sampling_fields(body: CompletionRequest) -> dict[str, Any]:
    if body.suffix:
        raise InvalidRequest("suffix is not supported", "suffix")
    if body.best_of is not None and body.best_of != body.choices:
        raise InvalidRequest(f"best_of must equal n ({body.choices}), got {body.best_of}", "best_of")
    fields = body.sampling_fields()
    if body.logprobs is not None:
        fields["logprobs"] = body.logprobs
        if body.echo:
            fields["prompt_logprobs"] = body.logprobs
    if _prompt_only(body):
        fields["max_tokens"] = 1
    return fields


def _prompt_only(body: CompletionRequest) -> bool:
    """Evaluation tools ask for the log probabilities of a prompt and nothing else."""
    return bool(body.echo) and body.max_tokens == 0


class _Writer:
    """Writes one choice: the echo of its prompt, then its answer."""

    def __init__(self, exchange: Exchange, body: CompletionRequest, index: int) -> None:
        self.index = index
        self.finish_reason: str | None = None
        self.stop_reason: int | str | None = None
        self._tokenizer = exchange.spec.tokenizer
        self._prompt = exchange.prompt_of(index) if body.echo else None
        self._prompt_only = _prompt_only(body)
        self._alternatives = body.logprobs
        self._echoed = 0  # characters before the answer

    def write(self, piece: Piece) -> tuple[str, CompletionLogprobs | None]:
        """New text of the choice, with the log probabilities of its tokens if asked for."""
        text = ""
        logprobs = None if self._alternatives is None else CompletionLogprobs(self._tokenizer, self._alternatives)
        if self._prompt is not None:
            text = self._prompt.text if self._prompt.text is not None else self._decoded(self._prompt)
            self._echoed = len(text)
            if logprobs is not None:
                logprobs.add_prompt(self._prompt.tokens, piece.prompt_logprobs or ())
            self._prompt = None
        if not self._prompt_only:
            text += piece.text
            if logprobs is not None:
                logprobs.add(piece.tokens, [self._echoed + offset for offset in piece.offsets])
        if piece.finish_reason is not None:
            self.finish_reason, self.stop_reason = piece.finish_reason.value, piece.stop_reason
        return text, logprobs

    def choice(self, text: str, logprobs: CompletionLogprobs | None) -> dict[str, Any]:
        """OpenAI's ``choices`` entry, as far as this choice has come."""
        choice = {
            "index": self.index,
            "text": text,
            "logprobs": None if logprobs is None else logprobs.body(),
            "finish_reason": self.finish_reason,
        }
        if self.finish_reason is not None:
            choice["stop_reason"] = self.stop_reason
        return choice

    def _decoded(self, prompt: Prompt) -> str:
        return self._tokenizer.decode(prompt.tokens)


async def _events(
    exchange: Exchange, writers: Sequence[_Writer], include_usage: bool, continuous_usage: bool
) -> AsyncGenerator[bytes, None]:
    head = _head(exchange)
    if include_usage:
        head["usage"] = None
    async with exchange.open() as answers:
        while pieces := await answers.next():
            parts = []
            if continuous_usage:
                head["usage"] = exchange.usage()
            for piece in pieces:
                writer = writers[piece.index]
                parts.append(event({**head, "choices": [writer.choice(*writer.write(piece))]}))
            yield b"".join(parts)
    if include_usage:
        yield event({**head, "choices": [], "usage": exchange.usage()}) + DONE
    else:
        yield DONE


async def _whole(exchange: Exchange, writers: Sequence[_Writer]) -> Response:
    texts: list[list[str]] = [[] for _ in writers]
    logprobs: list[CompletionLogprobs | None] = [None for _ in writers]
    async with within(exchange.deadline), exchange.open() as answers:
        while pieces := await answers.next():
            for piece in pieces:
                text, more = writers[piece.index].write(piece)
                texts[piece.index].append(text)
                known = logprobs[piece.index]
                if known is None or more is None:
                    logprobs[piece.index] = more
                else:
                    known.extend(more)
    choices = [
        writer.choice("".join(text), known) for writer, text, known in zip(writers, texts, logprobs, strict=True)
    ]
    body = {**_head(exchange), "choices": choices, "usage": exchange.usage()}
    return Response(orjson.dumps(body), media_type="application/json")


def _head(exchange: Exchange) -> dict[str, Any]:
    return {
        "id": exchange.id,
        "object": "text_completion",
        "created": exchange.created,
        "model": exchange.spec.name,
    }
