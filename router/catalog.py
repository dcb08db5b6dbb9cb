"""The models behind this router, learned from the workers that announce them.

Owns one `ModelSpec` for each fingerprint, fetched from the first worker that answers. Knows no requests.
Invariant: a spec is made once; two requests that need it at the same time wait for the same fetch.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence

from router.backend import ModelSpec
from router.legs import Channels
from splitserve.cluster import WorkerInfo
from splitserve.errors import Incompatible, SplitServeError, Unavailable
from splitserve.model_info import ModelDescription
from splitserve.text import Tokenizer

log = logging.getLogger(__name__)


class Catalog:
    def __init__(self, channels: Channels) -> None:
        self._channels = channels
        self._specs: dict[tuple[str, str], ModelSpec] = {}
        self._locks: dict[tuple[str, str], asyncio.Lock] = {}

    async def spec(self, workers: Sequence[WorkerInfo]) -> ModelSpec:
        """The spec of the model that these workers, all of one name and fingerprint, serve.

        Raises Unavailable if none of them answers.
        """
        key = (workers[0].model, workers[0].fingerprint)
        if key not in self._specs:
            async with self._locks.setdefault(key, asyncio.Lock()):
                if key not in self._specs:
                    self._specs[key] = await self._fetch(workers)
        return self._specs[key]

    def forget_all_but(self, keys: set[tuple[str, str]]) -> None:
        """Drops the specs of models that nobody serves any more."""
        for key in [k for k in self._specs if k not in keys]:
            del self._specs[key]
            self._locks.pop(key, None)

    async def _fetch(self, workers: Sequence[WorkerInfo]) -> ModelSpec:
        for worker in workers:
            try:
                description = await self._channels.model(worker)
                if description.fingerprint != worker.fingerprint:
                    raise Incompatible(f"{worker.id} announces one model and serves another")
                spec = await asyncio.to_thread(_spec, description, min(_pool_tokens(w) for w in workers))
            except SplitServeError as error:
                log.warning("%s does not say what it serves: %s", worker.id, error)
                continue
            log.info("learned a model", extra={"model": spec.name, "from": worker.id})
            return spec
        raise Unavailable(f"no worker of {workers[0].model} says what it serves")


def _pool_tokens(worker: WorkerInfo) -> int:
    return worker.num_blocks * worker.block_tokens


def _spec(description: ModelDescription, max_sequence_tokens: int) -> ModelSpec:
    return ModelSpec(
        name=description.model,
        fingerprint=description.fingerprint,
        tokenizer=Tokenizer(
            description.tokenizer_json, description.chat_template, dict(description.special_tokens)
        ),
        eos_token_ids=frozenset(description.eos_token_ids),
        max_model_len=description.max_model_len,
        vocab_size=description.vocab_size,
        block_tokens=description.block_tokens,
        max_sequence_tokens=max_sequence_tokens,
        generation_defaults=description.generation_defaults,
    )
