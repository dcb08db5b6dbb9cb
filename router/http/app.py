"""The HTTP front: OpenAI's API over any ``router.backend.Backend``.

Owns the assembly of routes, limits and errors; knows no workers.
"""

from __future__ import annotations

from importlib.metadata import version

from fastapi import FastAPI
from prometheus_client import CollectorRegistry

from router.backend import Backend
from router.http.chat import chat_routes
from router.http.completions import completion_routes
from router.http.errors import install_error_handlers
from router.http.health import health_routes
from router.http.limits import RequestGate
from router.http.models import model_routes
from router.http.service import GenerationService, HttpConfig
from router.http.tokenize import tokenize_routes
from router.observer import NullObserver, RequestObserver
from router.renderer import InlineRenderer, Renderer
from splitserve.api_keys import Keyring


def create_app(
    backend: Backend,
    config: HttpConfig | None = None,
    observer: RequestObserver | None = None,
    registry: CollectorRegistry | None = None,
    keyring: Keyring | None = None,
    renderer: Renderer | None = None,
) -> FastAPI:
    """An ASGI application.

    Args:
        backend: where tokens come from.
        config: limits and deadlines.
        observer: told about every answer, such as ``RouterMetrics``.
        registry: what ``/metrics`` shows.
        keyring: who may ask; without keys, everybody.
        renderer: of chat templates; default: one for templates that are known to be harmless.
    """
    config = config or HttpConfig()
    app = FastAPI(title="SplitServe", version=version("splitserve"), strict_content_type=False, redoc_url=None)
    app.add_middleware(RequestGate, limits=config.limits, keyring=keyring or Keyring())
    install_error_handlers(app)
    service = GenerationService(backend, config, observer or NullObserver(), renderer or InlineRenderer())
    for routes in (
        chat_routes(service),
        completion_routes(service),
        model_routes(backend),
        tokenize_routes(service),
        health_routes(backend, registry or CollectorRegistry()),
    ):
        app.include_router(routes)
    return app
