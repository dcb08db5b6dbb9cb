"""``POST /tokenize`` and ``/detokenize``: a model's tokenizer, without the model. Shapes are vLLM's."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter

from router.admission import check_tokens
from router.backend import ModelSpec
from router.http.conversation import conversation_text
from router.http.routing import JsonRoute
from router.http.schemas import DetokenizeRequest, TokenizeRequest
from router.http.service import GenerationService
from splitserve.errors import InvalidRequest

MAX_CHARS = 2**20  # about half a second of tokenising
MAX_TOKENS = 2**18  # about as long


def tokenize_routes(service: GenerationService) -> APIRouter:
    """The endpoints, bound to ``service``."""
    router = APIRouter(route_class=JsonRoute)

    @router.post("/tokenize", summary="Turn text or a conversation into token ids")
    async def tokenize(body: TokenizeRequest) -> dict[str, Any]:
        spec = await service.find_model(body.model)
        text, special = await _text(service, spec, body)
        if len(text) > MAX_CHARS:
            raise InvalidRequest(f"the text has {len(text)} characters; at most {MAX_CHARS} are allowed", "prompt")
        tokens = await spec.tokenizer.encode_async(text, special)
        strings = [spec.tokenizer.token_text(token) for token in tokens] if body.return_token_strs else None
        return {
            "count": len(tokens),
            "max_model_len": spec.max_model_len,
            "tokens": tokens,
            "token_strs": strings,
        }

    @router.post("/detokenize", summary="Turn token ids into text")
    async def detokenize(body: DetokenizeRequest) -> dict[str, Any]:
        spec = await service.find_model(body.model)
        if len(body.tokens) > MAX_TOKENS:
            raise InvalidRequest(f"{len(body.tokens)} tokens were given; at most {MAX_TOKENS} may be", "tokens")
        check_tokens(spec, body.tokens, "tokens")
        return {"prompt": spec.tokenizer.decode(body.tokens, skip_special_tokens=False)}

    return router


async def _text(service: GenerationService, spec: ModelSpec, body: TokenizeRequest) -> tuple[str, bool]:
    """The text and whether special tokens are to be added to it."""
    if (body.prompt is None) == (body.messages is None):
        raise InvalidRequest("give either prompt or messages", "prompt")
    if body.prompt is not None:
        return body.prompt, body.add_special_tokens is not False
    text = await conversation_text(service.renderer, spec, body.messages or (), body.add_generation_prompt)
    return text, bool(body.add_special_tokens)
