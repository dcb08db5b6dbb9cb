"""Bodies of HTTP requests, as OpenAI and vLLM define them.

Owns names and types; ranges are checked where the values are used. Types are strict (no number for a string,
no string for a number), unknown fields are ignored as OpenAI's own servers do.
Invariant: a field that is absent and one that is null mean the same, the default.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from splitserve.errors import InvalidRequest
from splitserve.sampling import MAX_LOGIT_BIAS, MAX_N

# Passed on to SamplingParams under the same name.
_SAMPLING_FIELDS = (
    "temperature",
    "top_p",
    "min_p",
    "seed",
    "max_tokens",
    "min_tokens",
    "ignore_eos",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
)
_TOKEN_IDS = 2**32  # ids are 32 bits wide on the wire

_Item = TypeVar("_Item")
# A wrong entry ends the look at a list: there may be millions, and an error for each costs seconds and gigabytes.
Many = Annotated[list[_Item], Field(fail_fast=True)]


def _few(bias: Any) -> Any:
    """Before the entries are looked at, for the same reason."""
    if isinstance(bias, dict) and len(bias) > MAX_LOGIT_BIAS:
        raise ValueError(f"takes at most {MAX_LOGIT_BIAS} tokens")
    return bias


class _Body(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)

    model: str | None = None


class StreamOptions(BaseModel):
    """Options of a streamed answer."""

    model_config = ConfigDict(strict=True, extra="ignore")

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None  # vLLM's: usage so far in every event


class GenerationBody(_Body):
    """What chat and completions have in common."""

    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    n: int | None = None
    seed: int | None = None
    stop: str | Many[str] | None = None
    stop_token_ids: Many[int] | None = None
    ignore_eos: bool | None = None
    min_tokens: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: Annotated[dict[str, float], BeforeValidator(_few)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    cache_salt: str | None = None

    @property
    def choices(self) -> int:
        """Answers to each prompt. Raises ``InvalidRequest``."""
        n = 1 if self.n is None else self.n
        if not 1 <= n <= MAX_N:
            raise InvalidRequest(f"n must be in [1, {MAX_N}], got {n}", "n")
        return n

    @property
    def include_usage(self) -> bool:
        """Raises ``InvalidRequest`` for stream options without a stream."""
        if self.stream_options is not None and not self.stream:
            raise InvalidRequest("stream_options is only allowed when stream is true", "stream_options")
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    @property
    def continuous_usage(self) -> bool:
        """Whether every event says how far the answer has come."""
        return self.include_usage and bool(self.stream_options and self.stream_options.continuous_usage_stats)

    def sampling_fields(self) -> dict[str, Any]:
        """What the client set, by the names of ``SamplingParams``. Raises ``InvalidRequest``."""
        fields = {name: v for name in _SAMPLING_FIELDS if (v := getattr(self, name)) is not None}
        if self.top_k is not None:
            fields["top_k"] = 0 if self.top_k == -1 else self.top_k  # -1 is an older spelling of "all"
        if self.stop is not None:
            fields["stop"] = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        if self.stop_token_ids is not None:
            fields["stop_token_ids"] = tuple(self.stop_token_ids)
        if self.logit_bias is not None:
            fields["logit_bias"] = _token_keys(self.logit_bias)
        return fields


class CompletionRequest(GenerationBody):
    """``POST /v1/completions``"""

    prompt: str | Many[str] | Many[int] | Many[Many[int]]
    echo: bool | None = None
    logprobs: int | None = None
    best_of: int | None = None
    suffix: str | None = None
    add_special_tokens: bool | None = None


class ContentPart(BaseModel):
    """A part of a message; only text is understood."""

    model_config = ConfigDict(strict=True, extra="ignore")

    type: str
    text: str | None = None


class ChatMessage(BaseModel):
    """One turn of a conversation. Fields that are not named here reach the chat template as they are."""

    model_config = ConfigDict(strict=True, extra="allow")

    role: str
    content: str | Many[ContentPart] | None = None

    def for_template(self) -> dict[str, Any]:
        """Content as one string; raises ``InvalidRequest`` on ``messages``."""
        return {**(self.model_extra or {}), "role": self.role, "content": self._text()}

    def _text(self) -> str:
        if isinstance(self.content, str):
            return self.content
        if self.content is None:
            if self.role == "assistant":
                return ""
            raise InvalidRequest(f"a message of role {self.role!r} has no content", "messages")
        texts = []
        for part in self.content:
            if part.type != "text" or part.text is None:
                raise InvalidRequest(f"content of type {part.type!r} is not supported, only text", "messages")
            texts.append(part.text)
        return "\n".join(texts)


class ResponseFormat(BaseModel):
    """Only plain text is supported."""

    model_config = ConfigDict(strict=True, extra="ignore")

    type: str


class ChatRequest(GenerationBody):
    """``POST /v1/chat/completions``"""

    messages: Many[ChatMessage]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: Many[dict[str, Any]] | None = None
    response_format: ResponseFormat | None = None
    add_generation_prompt: bool | None = None


class TokenizeRequest(_Body):
    """``POST /tokenize``: of a text, or of a conversation as the chat template writes it."""

    prompt: str | None = None
    messages: Many[ChatMessage] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    return_token_strs: bool | None = None


class DetokenizeRequest(_Body):
    """``POST /detokenize``"""

    tokens: Many[int]


def _token_keys(bias: Mapping[str, float]) -> dict[int, float]:
    """JSON has only string keys; these must spell token ids."""
    result = {}
    for key, value in bias.items():
        if not (key.isascii() and key.isdigit() and len(key) <= 10 and int(key) < _TOKEN_IDS):
            raise InvalidRequest(f"logit_bias has key {key[:32]!r}, which is not a token id", "logit_bias")
        result[int(key)] = value
    return result
