"""What is let in: prompts and sampling parameters, held against the limits of their model.

Owns the checks that make a request valid for a backend (see ``router.backend``); knows neither HTTP nor gRPC.
Invariant: whatever passes can be served by any worker of the model. Every refusal names the field and, where
a size is at fault, both numbers.
"""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from router.backend import Backend, ModelSpec
from splitserve.errors import InvalidRequest, NotFound
from splitserve.sampling import SamplingParams

MAX_SALT_CHARS = 128


class ContextLengthExceeded(InvalidRequest):
    """Prompt and answer together are longer than the model or its workers allow."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt that fits its model. ``text`` is what the client wrote, if it wrote text."""

    tokens: Sequence[int]
    text: str | None = None


async def find_model(backend: Backend, name: str | None) -> ModelSpec:
    """The named model, or the only one if none is named.

    Raises:
        NotFound: no live worker serves it.
        InvalidRequest: none is named and there are several.
    """
    if name:
        return await backend.model(name)
    cards = await backend.models()
    if not cards:
        raise NotFound("No model is being served.", "model")
    if len(cards) > 1:
        names = ", ".join(card.name for card in cards)
        raise InvalidRequest(f"model is missing, and several are served: {names}", "model")
    return await backend.model(cards[0].name)


async def text_prompt(
    spec: ModelSpec, text: str, add_special_tokens: bool = True, field: str = "prompt"
) -> Prompt:
    """Tokenises ``text``, unless it is too long for the model at first sight.

    Raises:
        InvalidRequest: it is empty.
        ContextLengthExceeded: it leaves no room for an answer.
    """
    at_least = spec.tokenizer.at_least(text)
    if at_least >= spec.context:
        raise ContextLengthExceeded(
            f"{field} of {len(text)} characters has at least {at_least} tokens; "
            f"the maximum context length is {spec.context} tokens",
            field,
        )
    tokens = await spec.tokenizer.encode_async(text, add_special_tokens)
    return _fitting(spec, Prompt(tokens, text), field)


def token_prompt(spec: ModelSpec, tokens: Sequence[int], field: str = "prompt") -> Prompt:
    """Raises ``InvalidRequest`` for no tokens or ids out of the vocabulary, or too many of them."""
    prompt = _fitting(spec, Prompt(tokens), field)  # first: it looks at no token, and there may be millions
    check_tokens(spec, tokens, field)
    return prompt


def check_tokens(spec: ModelSpec, tokens: Sequence[int], field: str) -> None:
    """Raises ``InvalidRequest`` for an id out of the vocabulary."""
    if tokens and not 0 <= min(tokens) <= max(tokens) < spec.vocab_size:
        wrong = next(token for token in tokens if not 0 <= token < spec.vocab_size)
        raise InvalidRequest(
            f"{field} holds token id {wrong}, but the vocabulary has {spec.vocab_size} tokens", field
        )


def admit_sampling(
    spec: ModelSpec,
    prompt: Prompt,
    fields: Mapping[str, Any],
    default_max_tokens: int | None = None,
    field: str = "prompt",
) -> SamplingParams:
    """Parameters with ``seed`` and ``max_tokens`` filled in.

    Args:
        fields: what the client set, by the names of ``SamplingParams``.
        default_max_tokens: where neither client nor model say; ``None`` is what the context leaves.
        field: name of the field that holds the prompt.

    Raises:
        InvalidRequest: a value is out of its range.
        ContextLengthExceeded: prompt and answer do not fit together.
    """
    params = SamplingParams(**{"max_tokens": default_max_tokens, **spec.generation_defaults, **fields})
    check_tokens(spec, params.stop_token_ids, "stop_token_ids")
    check_tokens(spec, list(params.logit_bias), "logit_bias")
    room = spec.context - len(prompt.tokens)
    if "max_tokens" not in fields or params.max_tokens is None:
        max_tokens = room if params.max_tokens is None else min(params.max_tokens, room)
    else:
        max_tokens = params.max_tokens
        _check_sum(spec, len(prompt.tokens), max_tokens, field)
    seed = secrets.randbits(63) if params.seed is None else params.seed
    return replace(params, max_tokens=max_tokens, seed=seed)


def nth_seed(params: SamplingParams, n: int) -> SamplingParams:
    """The parameters of the ``n``-th answer to one prompt: same but for its random numbers."""
    assert params.seed is not None
    return params if n == 0 else replace(params, seed=(params.seed + n) % 2**63)


def check_salt(salt: str | None) -> str:
    """Raises ``InvalidRequest`` for one that is too long."""
    if salt is not None and len(salt) > MAX_SALT_CHARS:
        raise InvalidRequest(
            f"cache_salt has {len(salt)} characters; at most {MAX_SALT_CHARS} are allowed", "cache_salt"
        )
    return salt or ""


def tenant_salt(tenant: str, salt: str) -> str:
    """One salt of both, empty if both are. A hash, so that no client can spell another tenant's."""
    if not tenant and not salt:
        return ""
    return hashlib.sha256(json.dumps([tenant, salt]).encode()).hexdigest()


def _fitting(spec: ModelSpec, prompt: Prompt, field: str) -> Prompt:
    if not prompt.tokens:
        raise InvalidRequest(f"{field} must not be empty", field)
    _check_sum(spec, len(prompt.tokens), 1, field)
    return prompt


def _check_sum(spec: ModelSpec, prompt: int, answer: int, field: str) -> None:
    asked = f"{prompt + answer} tokens were asked for ({prompt} in {field}, {answer} to generate)"
    if prompt + answer > spec.max_model_len:
        raise ContextLengthExceeded(
            f"This model's maximum context length is {spec.max_model_len} tokens, but {asked}", field
        )
    if prompt + answer > spec.max_sequence_tokens:
        raise ContextLengthExceeded(
            f"The KV cache can hold {spec.max_sequence_tokens} tokens of one sequence, but {asked}", field
        )
