"""What a request asks of the sampler, and what the sampler says: shared by client, router and engine."""

from __future__ import annotations

import enum
import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from splitserve.errors import InvalidRequest

MAX_STOP_STRINGS = 16
MAX_STOP_LENGTH = 1024
MAX_STOP_TOKEN_IDS = 128
MAX_LOGPROBS = 20
MAX_LOGIT_BIAS = 1024
MAX_N = 16


class FinishReason(enum.StrEnum):
    """Why an answer ended."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to choose tokens and when to stop.

    Names, meanings and defaults are vLLM's. ``max_tokens=None`` means what the context leaves. ``seed`` keys
    the random numbers together with the token's position; a router fills it in where a client gave none.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    max_tokens: int | None = 16
    min_tokens: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    logprobs: int | None = None
    prompt_logprobs: int | None = None

    def __post_init__(self) -> None:
        for name, low, high, open_low in _RANGES:
            value = getattr(self, name)
            if value is None:
                continue
            inside = low < value if open_low else low <= value
            if not (math.isfinite(value) and inside and value <= high):
                bracket = "(" if open_low else "["
                raise InvalidRequest(f"{name} must be in {bracket}{low:g}, {high:g}], got {value}", name)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise InvalidRequest(
                f"min_tokens ({self.min_tokens}) must not exceed max_tokens ({self.max_tokens})", "min_tokens"
            )
        if len(self.stop) > MAX_STOP_STRINGS:
            raise InvalidRequest(f"stop takes at most {MAX_STOP_STRINGS} strings, got {len(self.stop)}", "stop")
        if any(not s or len(s) > MAX_STOP_LENGTH for s in self.stop):
            raise InvalidRequest(f"each stop string must have 1 to {MAX_STOP_LENGTH} characters", "stop")
        if len(self.stop_token_ids) > MAX_STOP_TOKEN_IDS or any(t < 0 for t in self.stop_token_ids):
            raise InvalidRequest(
                f"stop_token_ids takes at most {MAX_STOP_TOKEN_IDS} ids, none negative", "stop_token_ids"
            )
        if len(self.logit_bias) > MAX_LOGIT_BIAS:
            raise InvalidRequest(f"logit_bias takes at most {MAX_LOGIT_BIAS} tokens", "logit_bias")
        if any(not -100 <= b <= 100 or t < 0 for t, b in self.logit_bias.items()):
            raise InvalidRequest("logit_bias maps token ids to values in [-100, 100]", "logit_bias")

    @property
    def greedy(self) -> bool:
        return self.temperature < 1e-5


# name, low, high, whether low itself is excluded
_RANGES: tuple[tuple[str, float, float, bool], ...] = (
    ("temperature", 0.0, 2.0, False),
    ("top_p", 0.0, 1.0, True),
    ("top_k", 0, 2**31 - 1, False),
    ("min_p", 0.0, 1.0, False),
    ("seed", 0, 2**63 - 1, False),
    ("max_tokens", 1, 2**31 - 1, False),
    ("min_tokens", 0, 2**31 - 1, False),
    ("presence_penalty", -2.0, 2.0, False),
    ("frequency_penalty", -2.0, 2.0, False),
    ("repetition_penalty", 0.0, 2.0, True),
    ("logprobs", 0, MAX_LOGPROBS, False),
    ("prompt_logprobs", 0, MAX_LOGPROBS, False),
)


@dataclass(frozen=True, slots=True)
class Logprobs:
    """Log probabilities (natural) at one position, before temperature, penalties and filters."""

    logprob: float
    rank: int  # 1 is the most likely token
    top: tuple[tuple[int, float], ...] = ()  # (token id, log probability), most likely first


@dataclass(frozen=True, slots=True)
class TokenOutput:
    """One generated token. ``index`` counts from 0 at the first token after the client's prompt."""

    index: int
    token: int
    logprobs: Logprobs | None = None
    finish_reason: FinishReason | None = None
