"""The seam between the fronts and whatever generates tokens.

Owns the plain data that crosses it. A front (HTTP, gRPC) knows text, a backend knows token ids; neither knows
the other. Backends: the cluster of workers, and ``router.echo`` which needs none.
Invariant: a request that reaches a backend is valid for its model: token ids below the vocabulary size,
prompt plus ``max_tokens`` within the context, ``seed`` and ``max_tokens`` set.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from splitserve.sampling import Logprobs, SamplingParams, TokenOutput
from splitserve.text import Tokenizer


@dataclass(frozen=True, slots=True)
class ModelCard:
    """A model that live workers serve, as a client sees it."""

    name: str
    max_model_len: int  # tokens
    prefill_workers: int
    decode_workers: int
    created: int = 0  # seconds since 1970; when this router first saw it


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """What a front needs of a model to turn text into requests and tokens into text."""

    name: str
    fingerprint: str
    tokenizer: Tokenizer
    eos_token_ids: frozenset[int]
    max_model_len: int  # tokens of prompt and answer
    vocab_size: int  # token ids are below
    block_tokens: int
    max_sequence_tokens: int  # what the smallest KV pool of its workers can hold
    # fields of SamplingParams for what a request leaves unset
    generation_defaults: Mapping[str, Any] = field(default_factory=dict)

    @property
    def context(self) -> int:
        """Tokens that prompt and answer may have together."""
        return min(self.max_model_len, self.max_sequence_tokens)


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One prompt to continue once. ``request_id`` is unique among all requests of all routers."""

    request_id: str
    model: str
    prompt_tokens: Sequence[int]
    sampling: SamplingParams  # seed and max_tokens are set
    cache_salt: str = ""
    deadline: float | None = None  # in the time of the running event loop


@dataclass(frozen=True, slots=True)
class GenerationChunk:
    """Tokens that arrived together, in order. ``cached_tokens`` and ``prompt_logprobs`` come at most once."""

    tokens: tuple[TokenOutput, ...] = ()
    cached_tokens: int | None = None  # tokens of the prompt found in a cache
    prompt_logprobs: tuple[Logprobs, ...] | None = None  # of the prompt's tokens after the first
    prefill_worker: str | None = None
    decode_worker: str | None = None


class Backend(Protocol):
    """Generates tokens for valid requests."""

    async def models(self) -> Sequence[ModelCard]:
        """The models that can be named in a request now."""
        ...

    async def model(self, name: str) -> ModelSpec:
        """Raises ``NotFound`` with ``field="model"`` if no live worker serves it."""
        ...

    def generate(self, request: GenerationRequest) -> AsyncGenerator[GenerationChunk, None]:
        """Ends after the token that carries a finish reason. ``aclose()`` cancels the work everywhere.

        Raises:
            SplitServeError: the request failed; tokens that were yielded before stand.
        """
        ...

    def readiness(self) -> Sequence[str]:
        """Why no request can be served now, in words; empty when ready."""
        ...
