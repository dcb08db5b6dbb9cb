"""``GET /v1/models``: what live workers serve."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter

from router.backend import Backend, ModelCard
from splitserve.errors import NotFound


def model_routes(backend: Backend) -> APIRouter:
    """The endpoints, bound to ``backend``."""
    router = APIRouter()

    @router.get("/v1/models", summary="List the models that are served now")
    async def list_models() -> dict[str, Any]:
        return {"object": "list", "data": [_entry(card) for card in await backend.models()]}

    @router.get("/v1/models/{name:path}", summary="Describe one model")
    async def get_model(name: str) -> dict[str, Any]:
        for card in await backend.models():
            if card.name == name:
                return _entry(card)
        raise NotFound(f"The model `{name}` does not exist.", "model")

    return router


def _entry(card: ModelCard) -> dict[str, Any]:
    return {
        "id": card.name,
        "object": "model",
        "created": card.created,
        "owned_by": "splitserve",
        "root": card.name,
        "parent": None,
        "max_model_len": card.max_model_len,
        "prefill_workers": card.prefill_workers,
        "decode_workers": card.decode_workers,
    }
