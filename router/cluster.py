"""The backend that stands for the whole cluster: models that live workers serve, and the way to an answer.

Owns no worker; joins the view (who lives), the catalog (what they serve) and the orchestrator (one request).
Invariant: a model is listed exactly while a decode worker of it lives.
"""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

from router.backend import GenerationChunk, GenerationRequest, ModelCard, ModelSpec
from router.catalog import Catalog
from router.legs import Channels
from router.orchestrator import Orchestrator
from router.request_limit import RequestLimit
from router.snapshot import ClusterView
from splitserve.cluster import Role
from splitserve.errors import NotFound, Unavailable

log = logging.getLogger(__name__)


class ClusterBackend:
    """Implements ``router.backend.Backend``."""

    def __init__(
        self,
        view: ClusterView,
        catalog: Catalog,
        channels: Channels,
        orchestrator: Orchestrator,
        limit: RequestLimit,
    ) -> None:
        self._view = view
        self._catalog = catalog
        self._channels = channels
        self._orchestrator = orchestrator
        self._limit = limit
        self._draining = False
        self._first_seen: dict[str, int] = {}  # model -> seconds since 1970

    def drain(self) -> None:
        """From now on not ready; requests in flight go on."""
        self._draining = True

    async def follow(self) -> None:
        """Learns models as they come and lets go of what has left, until cancelled."""
        while True:
            await self._view.changed.wait()
            self._view.changed.clear()
            pools = self._view.models().values()
            await self._channels.keep(self._view.addresses())
            self._catalog.forget_all_but({(pool.model, pool.fingerprint) for pool in pools})
            for pool in pools:
                try:
                    await self._catalog.spec([state.info for state in pool.states])
                except Unavailable as error:
                    log.warning("%s", error)  # a request for it will ask again

    async def models(self) -> Sequence[ModelCard]:
        return [
            ModelCard(
                name=pool.model,
                max_model_len=min(s.info.max_model_len for s in pool.states),
                prefill_workers=pool.count(Role.PREFILL),
                decode_workers=pool.count(Role.DECODE),
                created=self._first_seen.setdefault(pool.model, int(time.time())),
            )
            for pool in self._view.models().values()
            if any(s.info.role is Role.DECODE for s in pool.states)
        ]

    async def model(self, name: str) -> ModelSpec:
        pool = self._view.pool(name)
        if pool is None:
            await self._view.refresh()  # its first worker may just have joined
            pool = self._view.pool(name)
        if pool is None and name in self._first_seen:
            raise Unavailable(f"no worker of {name} is ready")
        if pool is None:
            raise NotFound(f"The model `{name}` does not exist.", "model")
        return await self._catalog.spec([state.info for state in pool.states])

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[GenerationChunk, None]:
        with self._limit.place():
            spec = await self.model(request.model)
            async with aclosing(self._orchestrator.generate(request, spec)) as chunks:
                async for chunk in chunks:
                    yield chunk

    def readiness(self) -> Sequence[str]:
        if self._draining:
            return ["draining"]
        if not any(pool.count(Role.DECODE) for pool in self._view.models().values()):
            return ["no decode worker is ready" + (", and the directory is away" if self._view.stale else "")]
        return []
