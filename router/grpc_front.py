"""The public gRPC API, ``splitserve.v1.Inference``: the same answers as over HTTP, with token ids.

Owns the translation between messages and ``router.answers``; errors leave as ``SplitServeError`` and are turned
into statuses by the server's interceptor. Invariant: a cancelled call has no work left when its method returns.
"""

from __future__ import annotations

import asyncio
import math
import secrets
import uuid
from collections.abc import AsyncGenerator

import grpc
import grpc.aio

from router.admission import (
    Prompt,
    admit_sampling,
    check_salt,
    find_model,
    tenant_salt,
    text_prompt,
    token_prompt,
)
from router.answers import Answer, Answers, Piece
from router.backend import Backend, GenerationRequest, ModelSpec
from router.observer import NullObserver, RequestObserver
from splitserve.api_keys import Keyring
from splitserve.errors import InvalidRequest
from splitserve.grpc_auth import authorization
from splitserve.v1 import inference_pb2 as pb
from splitserve.v1 import inference_pb2_grpc
from splitserve.wire import finish_reason_to_proto, sampling_fields, token_to_proto

MAX_REQUEST_ID = 128
SERVICE = "splitserve.v1.Inference"

Context = grpc.aio.ServicerContext[pb.GenerateRequest, pb.GenerateResponse]


class InferenceServicer(inference_pb2_grpc.InferenceServicer):
    """Serves ``backend``; ``observer`` is told about every answer; ``keyring`` names the tenants.

    ``request_seconds``: longest life of a request; the call's deadline can shorten it."""

    def __init__(
        self,
        backend: Backend,
        observer: RequestObserver | None = None,
        keyring: Keyring | None = None,
        request_seconds: float = 3600.0,
    ) -> None:
        self._backend = backend
        self._request_seconds = request_seconds
        self._observer = observer or NullObserver()
        self._keyring = keyring or Keyring()

    async def Generate(
        self, request: pb.GenerateRequest, context: Context
    ) -> AsyncGenerator[pb.GenerateResponse, None]:
        """Raises ``SplitServeError``."""
        loop = asyncio.get_running_loop()
        arrived = loop.time()
        remaining = context.time_remaining()
        request_id = _request_id(request)
        tenant = self._keyring.tenant(authorization(context.invocation_metadata()))
        spec = await find_model(self._backend, request.model)
        prompt = await _prompt(spec, request)
        generation = GenerationRequest(
            request_id=f"{request_id}-{secrets.token_hex(4)}",
            model=spec.name,
            prompt_tokens=prompt.tokens,
            sampling=admit_sampling(spec, prompt, sampling_fields(request.sampling)),
            cache_salt=tenant_salt(tenant, check_salt(request.cache_salt)),
            deadline=arrived + min(self._request_seconds, remaining or math.inf),
        )
        answer = Answer(self._backend, spec, generation, 0, arrived, self._observer)
        async with Answers([answer]) as answers:
            while pieces := await answers.next():
                for piece in pieces:
                    yield _response(request_id, piece, prompt, answer)

    async def ListModels(
        self, request: pb.ListModelsRequest, context: grpc.aio.ServicerContext[object, object]
    ) -> pb.ListModelsResponse:
        """The models that live workers serve."""
        cards = await self._backend.models()
        return pb.ListModelsResponse(
            models=[
                pb.ModelCard(
                    id=card.name,
                    max_model_len=card.max_model_len,
                    prefill_workers=card.prefill_workers,
                    decode_workers=card.decode_workers,
                )
                for card in cards
            ]
        )


def _request_id(request: pb.GenerateRequest) -> str:
    given = request.request_id
    if len(given) > MAX_REQUEST_ID or not given.isprintable():
        raise InvalidRequest(f"request_id must have at most {MAX_REQUEST_ID} printable characters", "request_id")
    return given or uuid.uuid4().hex


async def _prompt(spec: ModelSpec, request: pb.GenerateRequest) -> Prompt:
    match request.WhichOneof("prompt"):
        case "text":
            return await text_prompt(spec, request.text)
        case "tokens":
            return token_prompt(spec, request.tokens.ids)
        case _:
            raise InvalidRequest("prompt must not be empty", "prompt")


def _response(request_id: str, piece: Piece, prompt: Prompt, answer: Answer) -> pb.GenerateResponse:
    response = pb.GenerateResponse(
        request_id=request_id,
        text=piece.text,
        tokens=[token_to_proto(token) for token in piece.tokens],
        finish_reason=finish_reason_to_proto(piece.finish_reason),
    )
    if piece.finish_reason is not None:
        response.usage.prompt_tokens = len(prompt.tokens)
        response.usage.completion_tokens = answer.completion_tokens
        response.usage.cached_tokens = answer.cached_tokens
    return response
