"""What the endpoints share: from a body to running answers, with the request's id, deadline and name.

Owns the way from one HTTP request to ``Answers``; knows no JSON shape.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from fastapi import Request

from router.admission import Prompt, admit_sampling, check_salt, find_model, nth_seed, tenant_salt
from router.answers import Answer, Answers
from router.backend import Backend, GenerationRequest, ModelSpec
from router.http.limits import RequestLimits, request_timeout
from router.http.schemas import GenerationBody
from router.observer import RequestObserver
from router.renderer import Renderer


@dataclass(frozen=True, slots=True)
class HttpConfig:
    """How the HTTP front treats its clients."""

    limits: RequestLimits = field(default_factory=RequestLimits)
    request_seconds: float = 3600.0  # longest life of a request; X-Request-Timeout can shorten it
    max_prompts: int = 64  # in one request
    max_choices: int = 128  # prompts times n


@dataclass(frozen=True, slots=True)
class Exchange:
    """One generating request while it is being answered."""

    id: str
    spec: ModelSpec
    prompts: Sequence[Prompt]
    answers: Sequence[Answer]  # of all prompts: answer ``i`` is to prompt ``i // n``
    created: int  # seconds since 1970
    deadline: float  # loop time

    def open(self) -> Answers:
        """Starts all answers; leave the block to stop them."""
        return Answers(self.answers)

    def prompt_of(self, index: int) -> Prompt:
        return self.prompts[index * len(self.prompts) // len(self.answers)]

    def usage(self) -> dict[str, Any]:
        """OpenAI's ``usage``; a prompt counts once, however many answers it has."""
        prompt = sum(len(prompt.tokens) for prompt in self.prompts)
        completion = sum(answer.completion_tokens for answer in self.answers)
        per_prompt = len(self.answers) // len(self.prompts)
        cached = sum(answer.cached_tokens for answer in self.answers[::per_prompt])
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": cached},
        }


class GenerationService:
    """Turns bodies into exchanges."""

    def __init__(
        self, backend: Backend, config: HttpConfig, observer: RequestObserver, renderer: Renderer
    ) -> None:
        self.backend = backend
        self.config = config
        self.renderer = renderer
        self._observer = observer

    async def find_model(self, name: str | None) -> ModelSpec:
        """Raises ``NotFound`` or, if none is named, ``InvalidRequest``."""
        return await find_model(self.backend, name)

    def deadline(self, request: Request) -> float:
        """In loop time. Raises ``InvalidRequest``."""
        seconds = request_timeout(request.headers.get("x-request-timeout"), self.config.request_seconds)
        return asyncio.get_running_loop().time() + seconds

    def exchange(
        self,
        request: Request,
        body: GenerationBody,
        spec: ModelSpec,
        prompts: Sequence[Prompt],
        fields: dict[str, Any],
        *,
        default_max_tokens: int | None,
        prefix: str,
        field: str,
        arrived: float,
        deadline: float,
    ) -> Exchange:
        """Admits ``n`` answers to each prompt.

        Args:
            fields: what the client set of ``SamplingParams``.
            prefix: of the id that the client sees.
            field: name of the field that holds the prompt.

        Raises:
            InvalidRequest: a parameter is out of its range or does not fit the prompt.
        """
        n = body.choices
        state = request.scope["state"]
        salt, request_id = tenant_salt(state["tenant"], check_salt(body.cache_salt)), state["request_id"]
        answers: list[Answer] = []
        for prompt in prompts:
            sampling = admit_sampling(spec, prompt, fields, default_max_tokens, field)
            for choice in range(n):
                generation = GenerationRequest(
                    # a client may use one id twice, workers must not see it twice
                    request_id=f"{request_id}-{secrets.token_hex(4)}",
                    model=spec.name,
                    prompt_tokens=prompt.tokens,
                    sampling=nth_seed(sampling, choice),
                    cache_salt=salt,
                    deadline=deadline,
                )
                answers.append(Answer(self.backend, spec, generation, len(answers), arrived, self._observer))
        return Exchange(f"{prefix}-{request_id}", spec, prompts, answers, int(time.time()), deadline)
