"""Whether this router lives, can serve, which version it is and what it counts."""

from __future__ import annotations

from importlib.metadata import version

from fastapi import APIRouter, Request, Response
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

from router.backend import Backend
from splitserve.errors import Unavailable


def health_routes(backend: Backend, registry: CollectorRegistry) -> APIRouter:
    """The endpoints, bound to ``backend`` and ``registry``."""
    router = APIRouter()

    @router.get("/live", summary="200 while the process answers at all")
    async def live() -> dict[str, str]:
        return {"status": "ok"}

    @router.get("/ready", summary="200 if requests can be served, else 503 with the reasons")
    @router.get("/health", summary="The same as /ready")
    async def ready(request: Request) -> dict[str, str]:
        if reasons := backend.readiness():
            known = request.scope["state"]["tenant"] is not None  # a stranger learns the status alone
            raise Unavailable(f"not ready: {'; '.join(reasons)}" if known else "not ready")
        return {"status": "ok"}

    @router.get("/version", summary="The version of SplitServe")
    async def get_version() -> dict[str, str]:
        return {"version": version("splitserve")}

    @router.get("/metrics", summary="Prometheus metrics of this router")
    async def metrics() -> Response:
        return Response(generate_latest(registry), headers={"Content-Type": CONTENT_TYPE_LATEST})

    return router
