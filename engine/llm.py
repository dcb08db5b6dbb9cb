"""Offline use of one engine, in this process: a model, prompts in, texts out.

Also the oracle: what a cluster answers greedily must equal what this answers.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from engine.config import EngineConfig
from engine.core import Engine
from engine.sequence import EngineRequest
from engine.weights import open_model
from splitserve.models import resolve_model
from splitserve.sampling import FinishReason, Logprobs, SamplingParams
from splitserve.text import IncrementalDetokenizer, StopStrings, Tokenizer

Prompt = str | Sequence[int]


@dataclass(slots=True)
class Completion:
    """The answer to one prompt."""

    prompt_tokens: list[int]
    tokens: list[int]
    text: str
    finish_reason: FinishReason
    logprobs: list[Logprobs]
    prompt_logprobs: tuple[Logprobs, ...] | None
    cached_tokens: int


@dataclass(slots=True)
class _Work:
    completion: Completion
    detokenizer: IncrementalDetokenizer
    stop: StopStrings
    min_tokens: int
    pieces: list[str]


class LLM:
    """``LLM(model).generate(prompts, SamplingParams(...))``; options are those of `EngineConfig`."""

    def __init__(self, model: str, **options: Any) -> None:
        unknown = options.keys() - {f.name for f in fields(EngineConfig)}
        if unknown:
            raise TypeError(f"unknown options: {', '.join(sorted(unknown))}")
        files = open_model(resolve_model(model))
        self.engine = Engine(EngineConfig(model=model, **options), files)
        tokenizer_json, template, special = files.tokenizer()
        self.tokenizer = Tokenizer(tokenizer_json.encode(), template, special)
        self._ids = itertools.count()

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[Completion]:
        """One completion for each prompt, in order, computed together. A prompt is text or token ids.

        Raises InvalidRequest before any work if one of the requests can never be served.
        """
        batch = _as_batch(prompts)
        each = list(params) if isinstance(params, Sequence) else [params or SamplingParams()] * len(batch)
        requests = []
        for prompt, sampling in zip(batch, each, strict=True):
            tokens = self.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
            requests.append(EngineRequest(f"llm-{next(self._ids)}", tokens, sampling))
        for request in requests:
            self.engine.validate(request)
        works = {request.request_id: self._add(request) for request in requests}
        while self.engine.has_work:
            result = self.engine.step()
            if result.failed:
                raise result.failed[0][1]
            for request_id, output in result.outputs:
                work = works[request_id]
                work.completion.cached_tokens = output.cached_tokens
                work.completion.prompt_logprobs = output.prompt_logprobs or work.completion.prompt_logprobs
                for token in output.tokens:
                    self._push(request_id, work, token.token, token.logprobs, token.finish_reason)
        return [works[request.request_id].completion for request in requests]

    def chat(self, messages: Sequence[dict[str, Any]], params: SamplingParams | None = None) -> Completion:
        """The model's answer to a conversation, through its chat template."""
        text = self.tokenizer.apply_chat_template(messages)
        tokens = self.tokenizer.encode(text, add_special_tokens=False)
        return self.generate([tokens], params)[0]

    def _add(self, request: EngineRequest) -> _Work:
        self.engine.add(request)
        completion = Completion(list(request.tokens), [], "", FinishReason.ABORT, [], None, 0)
        stop = StopStrings(request.params.stop)
        detokenizer = IncrementalDetokenizer(self.tokenizer)
        return _Work(completion, detokenizer, stop, request.params.min_tokens, [])

    def _push(
        self, request_id: str, work: _Work, token: int, logprobs: Logprobs | None, reason: FinishReason | None
    ) -> None:
        completion = work.completion
        completion.tokens.append(token)
        if logprobs is not None:
            completion.logprobs.append(logprobs)
        text = work.detokenizer.push(token)
        work.pieces.append(work.stop.push(text, check=len(completion.tokens) > work.min_tokens))
        if work.stop.matched is not None:
            reason = FinishReason.STOP
            self.engine.abort(request_id)
        elif reason is not None:
            work.pieces.append(work.stop.push(work.detokenizer.flush()))
            if work.stop.matched is None:
                work.pieces.append(work.stop.flush())
        if reason is not None:
            completion.finish_reason = reason
            completion.text = "".join(work.pieces)


def _as_batch(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    if isinstance(prompts, str):
        return [prompts]
    if prompts and isinstance(prompts[0], int):
        return [prompts]  # type: ignore[list-item]
    return list(prompts)  # type: ignore[arg-type]
