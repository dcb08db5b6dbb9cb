"""``POST /v1/chat/completions``: a conversation and its next turn, in OpenAI's shapes.

Invariant: streamed deltas of one choice, joined, are the message that the plain answer would hold.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from typing import Any

import orjson
from fastapi import APIRouter, Request, Response

from router.admission import Prompt, text_prompt
from router.answers import Piece
from router.backend import ModelSpec
from router.http.conversation import conversation_text
from router.http.routing import JsonRoute
from router.http.schemas import ChatRequest
from router.http.service import Exchange, GenerationService
from router.http.sse import DONE, EventStream, event, until_disconnect, within
from splitserve.errors import InvalidRequest
from splitserve.sampling import MAX_LOGPROBS, TokenOutput
from splitserve.text import Tokenizer

LOWEST = -9999.0  # stands for minus infinity, which JSON lacks


def chat_routes(service: GenerationService) -> APIRouter:
    """The endpoint, bound to ``service``."""
    router = APIRouter(route_class=JsonRoute)

    @router.post("/v1/chat/completions", summary="Answer a conversation")
    async def chat_completions(request: Request, body: ChatRequest) -> Response:
        arrived = asyncio.get_running_loop().time()
        include_usage = body.include_usage
        deadline = service.deadline(request)
        spec = await service.find_model(body.model)
        fields = _sampling_fields(body)
        async with within(deadline):
            prompt = await _prompt(service, spec, body)
        exchange = service.exchange(
            request,
            body,
            spec,
            [prompt],
            fields,
            default_max_tokens=None,
            prefix="chatcmpl",
            field="messages",
            arrived=arrived,
            deadline=deadline,
        )
        if body.stream:
            events = _events(exchange, bool(body.logprobs), include_usage, body.continuous_usage)
            return EventStream(events, deadline)
        return await until_disconnect(request.receive, _whole(exchange, bool(body.logprobs)))

    return router


async def _prompt(service: GenerationService, spec: ModelSpec, body: ChatRequest) -> Prompt:
    text = await conversation_text(service.renderer, spec, body.messages, body.add_generation_prompt)
    return await text_prompt(spec, text, add_special_tokens=False, field="messages")


def _sampling_fields(body: ChatRequest) -> dict[str, Any]:
    if body.tools:
        raise InvalidRequest("tools are not supported", "tools")
    if body.response_format is not None and body.response_format.type != "text":
        raise InvalidRequest(
            f"response_format {body.response_format.type!r} is not supported, only 'text'", "response_format"
        )
    if body.top_logprobs is not None and not body.logprobs:
        raise InvalidRequest("top_logprobs needs logprobs to be true", "top_logprobs")
    if body.top_logprobs is not None and not 0 <= body.top_logprobs <= MAX_LOGPROBS:
        raise InvalidRequest(
            f"top_logprobs must be in [0, {MAX_LOGPROBS}], got {body.top_logprobs}", "top_logprobs"
        )
    fields = body.sampling_fields()
    if body.max_completion_tokens is not None:
        fields["max_tokens"] = body.max_completion_tokens
    if body.logprobs:
        fields["logprobs"] = body.top_logprobs or 0
    return fields


async def _events(
    exchange: Exchange, logprobs: bool, include_usage: bool, continuous_usage: bool
) -> AsyncGenerator[bytes, None]:
    head = _head(exchange, "chat.completion.chunk")
    if include_usage:
        head["usage"] = None
    tokenizer = exchange.spec.tokenizer
    greeted: set[int] = set()
    async with exchange.open() as answers:
        while pieces := await answers.next():
            parts = []
            if continuous_usage:
                head["usage"] = exchange.usage()
            for piece in pieces:
                if piece.index not in greeted:
                    greeted.add(piece.index)
                    role = {"role": "assistant", "content": ""}
                    parts.append(event({**head, "choices": [_choice(piece.index, "delta", role)]}))
                choice = _choice(piece.index, "delta", {"content": piece.text}, piece)
                if logprobs:
                    choice["logprobs"] = {"content": _token_logprobs(tokenizer, piece.tokens)}
                parts.append(event({**head, "choices": [choice]}))
            yield b"".join(parts)
    if include_usage:
        yield event({**head, "choices": [], "usage": exchange.usage()}) + DONE
    else:
        yield DONE


async def _whole(exchange: Exchange, logprobs: bool) -> Response:
    count = len(exchange.answers)
    texts: list[list[str]] = [[] for _ in range(count)]
    contents: list[list[dict[str, Any]]] = [[] for _ in range(count)]
    last: dict[int, Piece] = {}
    async with within(exchange.deadline), exchange.open() as answers:
        while pieces := await answers.next():
            for piece in pieces:
                texts[piece.index].append(piece.text)
                if logprobs:
                    contents[piece.index] += _token_logprobs(exchange.spec.tokenizer, piece.tokens)
                last[piece.index] = piece
    choices = []
    for index in range(count):
        message = {"role": "assistant", "content": "".join(texts[index]), "refusal": None}
        choice = _choice(index, "message", message, last[index])
        choice["logprobs"] = {"content": contents[index]} if logprobs else None
        choices.append(choice)
    body = {**_head(exchange, "chat.completion"), "choices": choices, "usage": exchange.usage()}
    return Response(orjson.dumps(body), media_type="application/json")


def _head(exchange: Exchange, kind: str) -> dict[str, Any]:
    return {"id": exchange.id, "object": kind, "created": exchange.created, "model": exchange.spec.name}


def _choice(index: int, name: str, content: dict[str, Any], piece: Piece | None = None) -> dict[str, Any]:
    choice = {"index": index, name: content, "logprobs": None, "finish_reason": None}
    if piece is not None and piece.finish_reason is not None:
        choice["finish_reason"] = piece.finish_reason.value
        choice["stop_reason"] = piece.stop_reason
    return choice


def _token_logprobs(tokenizer: Tokenizer, tokens: Sequence[TokenOutput]) -> list[dict[str, Any]]:
    entries = []
    for token in tokens:
        if token.logprobs is None:
            continue
        entry = _entry(tokenizer, token.token, token.logprobs.logprob)
        entry["top_logprobs"] = [_entry(tokenizer, other, value) for other, value in token.logprobs.top]
        entries.append(entry)
    return entries


def _entry(tokenizer: Tokenizer, token: int, logprob: float) -> dict[str, Any]:
    data = tokenizer.token_bytes(token)
    text = data.decode(errors="replace")
    return {"token": text, "logprob": max(logprob, LOWEST), "bytes": list(data)}
