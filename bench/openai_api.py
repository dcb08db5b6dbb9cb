"""OpenAI's streaming API from a client's side: bodies out, tokens in.

Knows ``/v1/completions`` and ``/v1/chat/completions`` of any server. How many tokens an event carries is what the
server says in ``usage`` (asked for with vLLM's ``continuous_usage_stats``); a server that does not say is taken to
send one a piece. Invariant: counts of events add up to the count of the answer, or it is not ``counted``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import cycle, islice
from typing import Any

import orjson

from bench.http_client import RequestFailed
from bench.record import Arrival
from bench.words import as_text

DONE = b"[DONE]"


@dataclass(frozen=True, slots=True)
class Past:
    """An earlier turn of a conversation."""

    asked: Sequence[int]  # what its prompt added
    answer: str
    answer_tokens: int

    def tokens(self) -> list[int]:
        """The turn as ids. Those of the answer are unknown: as many others stand for them."""
        return [*self.asked, *islice(cycle(self.asked), self.answer_tokens)]


@dataclass(frozen=True, slots=True)
class Api:
    """How to ask.

    ``prompt_form``: ``tokens`` sends ids, ``text`` sends words, one for each id. Chats are always words.
    """

    model: str
    chat: bool = False
    prompt_form: str = "tokens"
    ignore_eos: bool = False
    temperature: float = 0.0
    extra_body: Mapping[str, Any] = field(default_factory=dict)

    @property
    def path(self) -> str:
        return "/v1/chat/completions" if self.chat else "/v1/completions"

    def body(self, history: Sequence[Past], prompt: Sequence[int], max_tokens: int) -> bytes:
        """The JSON of one turn, whose prompt is the history and then ``prompt``."""
        body: dict[str, Any] = {
            "model": self.model,
            "max_tokens": max_tokens,
            "temperature": self.temperature,
            "stream": True,
            "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        }
        if self.ignore_eos:
            body |= {"ignore_eos": True, "min_tokens": max_tokens}
        if self.chat:
            messages = []
            for past in history:
                messages.append({"role": "user", "content": as_text(past.asked)})
                messages.append({"role": "assistant", "content": past.answer})
            body["messages"] = [*messages, {"role": "user", "content": as_text(prompt)}]
        elif self.prompt_form == "text":
            body["prompt"] = "".join(as_text(past.asked) + past.answer for past in history) + as_text(prompt)
        else:
            body["prompt"] = [*(token for past in history for token in past.tokens()), *prompt]
        return orjson.dumps(body | dict(self.extra_body))


class AnswerReader:
    """Reads the events of one streamed answer as they come."""

    def __init__(self) -> None:
        self.arrivals: list[Arrival] = []
        self.prompt_tokens = 0
        self.output_tokens = 0
        self.cached_tokens = 0
        self.counted = False
        self.finished = False
        self._texts: list[str] = []

    @property
    def text(self) -> str:
        return "".join(self._texts)

    def read(self, data: bytes, now: float) -> None:
        """Takes one event. Raises RequestFailed if it reports an error or can't be read."""
        if data == DONE:
            self.finished = True
            return
        try:
            event = orjson.loads(data)
            if error := event.get("error"):
                raise RequestFailed(f"error in the stream: {error}")
            self._take(event, now)
        except (orjson.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
            raise RequestFailed(f"not an event of this API: {data[:200]!r}") from error

    def _take(self, event: dict[str, Any], now: float) -> None:
        usage = event.get("usage")
        if usage and usage.get("prompt_tokens"):
            self.prompt_tokens = usage["prompt_tokens"]
            self.cached_tokens = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
        if choices := event.get("choices"):
            tokens = self._tokens(choices[0], usage)
            if tokens:
                self.arrivals.append(Arrival(now, tokens))
                self.output_tokens += tokens
        elif usage:
            self.counted = self.output_tokens == usage["completion_tokens"]
            self.output_tokens = usage["completion_tokens"]

    def _tokens(self, choice: dict[str, Any], usage: dict[str, Any] | None) -> int:
        plain = "text" in choice
        text = choice["text"] if plain else choice["delta"].get("content")
        if text:
            self._texts.append(text)
        if usage:
            self.counted = True
            return int(usage["completion_tokens"]) - self.output_tokens
        # the role of a chat's answer comes before any token; a bare end may come behind the last one
        return int(bool(text) or (plain and choice.get("finish_reason") is None))
