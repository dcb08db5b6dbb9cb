"""A backend without workers: answers with the prompt. The public double of ``router.backend.Backend``.

Owns made-up answers, delays and failures; everything that a front does with a backend can be tried on it.
Invariant: an answer is the prompt's tokens, those that end an answer left out, then an end-of-sequence token;
with ``ignore_eos`` the prompt again and again. Token choice and log probabilities depend on the prompt alone.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterator, Sequence
from dataclasses import dataclass
from itertools import count, islice

from router.backend import GenerationChunk, GenerationRequest, ModelCard, ModelSpec
from splitserve.errors import NotFound
from splitserve.sampling import FinishReason, Logprobs, TokenOutput


@dataclass(frozen=True, slots=True)
class EchoConfig:
    """How the made-up answers come."""

    first_delay: float = 0.0  # seconds before the first token
    token_delay: float = 0.0  # seconds before each later chunk
    tokens_per_chunk: int = 1
    cached_tokens: int = 0  # reported for every prompt, at most its length
    failure: Exception | None = None  # an error of the tree, or a bug
    fail_after: int = 0  # tokens that come before the failure
    not_ready: tuple[str, ...] = ()


class EchoBackend:
    """Serves ``models``. ``active`` counts requests in work, ``cancelled`` those closed before their end."""

    def __init__(self, models: Sequence[ModelSpec], config: EchoConfig | None = None) -> None:
        self._models = {model.name: model for model in models}
        self.config = config or EchoConfig()
        self.requests: list[GenerationRequest] = []
        self.active = 0
        self.cancelled = 0

    async def models(self) -> Sequence[ModelCard]:
        return [ModelCard(model.name, model.max_model_len, 1, 1) for model in self._models.values()]

    async def model(self, name: str) -> ModelSpec:
        try:
            return self._models[name]
        except KeyError:
            raise NotFound(f"The model `{name}` does not exist.", "model") from None

    def readiness(self) -> Sequence[str]:
        return self.config.not_ready

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[GenerationChunk, None]:
        config, spec = self.config, await self.model(request.model)
        self.requests.append(request)
        self.active += 1
        ended = False
        try:
            await asyncio.sleep(config.first_delay)
            first, sent = True, 0
            tokens = _answer(request, spec)
            while chunk := tuple(islice(tokens, 1 if first else config.tokens_per_chunk)):
                if not first:
                    await asyncio.sleep(config.token_delay)  # a delay of 0 still lets others run
                if config.failure is not None and sent >= config.fail_after:
                    ended = True
                    raise config.failure
                sent += len(chunk)
                ended = chunk[-1].finish_reason is not None
                if first:
                    cached = min(config.cached_tokens, len(request.prompt_tokens))
                    yield GenerationChunk(chunk, cached, _prompt_logprobs(request, spec))
                else:
                    yield GenerationChunk(chunk)
                first = False
        finally:
            self.active -= 1
            self.cancelled += not ended


def _answer(request: GenerationRequest, spec: ModelSpec) -> Iterator[TokenOutput]:
    sampling, prompt = request.sampling, request.prompt_tokens
    eos = min(spec.eos_token_ids, default=0)
    echo = [token for token in prompt if token not in spec.eos_token_ids] or [0]
    for index in count():
        token = echo[index % len(echo)] if sampling.ignore_eos or index < len(echo) else eos
        stops = token in sampling.stop_token_ids or (token in spec.eos_token_ids and not sampling.ignore_eos)
        reason = None
        if stops and index >= sampling.min_tokens:
            reason = FinishReason.STOP
        elif index + 1 == sampling.max_tokens:
            reason = FinishReason.LENGTH
        logprobs = None if sampling.logprobs is None else _logprobs(token, sampling.logprobs, spec)
        yield TokenOutput(index, token, logprobs, reason)
        if reason is not None:
            return


def _prompt_logprobs(request: GenerationRequest, spec: ModelSpec) -> tuple[Logprobs, ...] | None:
    alternatives = request.sampling.prompt_logprobs
    if alternatives is None:
        return None
    return tuple(_logprobs(token, alternatives, spec) for token in request.prompt_tokens[1:])


def _logprobs(token: int, alternatives: int, spec: ModelSpec) -> Logprobs:
    top = ((token + i) % spec.vocab_size for i in range(alternatives))
    return Logprobs(-0.5, 1, tuple((other, -0.5 * (i + 1)) for i, other in enumerate(top)))
