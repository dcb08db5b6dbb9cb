"""``logprobs`` of completions: four parallel lists, one entry a token.

Invariant: all lists have the same length; offsets count characters of the choice's text, echo included.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

from splitserve.sampling import Logprobs, TokenOutput
from splitserve.text import IncrementalDetokenizer, Tokenizer

LOWEST = -9999.0  # stands for minus infinity, which JSON lacks


class CompletionLogprobs:
    """Collects tokens. ``alternatives``: how many likely tokens are named at each position; 0 names none."""

    def __init__(self, tokenizer: Tokenizer, alternatives: int) -> None:
        self._tokenizer = tokenizer
        self._alternatives = alternatives
        self._tokens: list[str] = []
        self._logprobs: list[float | None] = []
        self._top: list[dict[str, float] | None] = []
        self._offsets: list[int] = []

    def add_prompt(self, tokens: Sequence[int], logprobs: Sequence[Logprobs]) -> None:
        """An echoed prompt; its first token has no probability. ``logprobs`` are of the tokens after it."""
        detokenizer, offset = IncrementalDetokenizer(self._tokenizer), 0
        for position, token in enumerate(tokens):
            known = logprobs[position - 1] if 0 < position <= len(logprobs) else None
            self._add(token, known, offset)
            offset += len(detokenizer.push(token))

    def add(self, tokens: Sequence[TokenOutput], offsets: Sequence[int]) -> None:
        """Generated tokens and where their text begins."""
        for token, offset in zip(tokens, offsets, strict=True):
            self._add(token.token, token.logprobs, offset)

    def extend(self, more: Self) -> None:
        """Appends what another one of the same choice collected."""
        self._tokens += more._tokens
        self._logprobs += more._logprobs
        self._top += more._top
        self._offsets += more._offsets

    def body(self) -> dict[str, Any]:
        """The JSON object."""
        return {
            "tokens": self._tokens,
            "token_logprobs": self._logprobs,
            "top_logprobs": self._top if self._alternatives else None,
            "text_offset": self._offsets,
        }

    def _add(self, token: int, logprobs: Logprobs | None, offset: int) -> None:
        text = self._tokenizer.token_text(token)
        self._tokens.append(text)
        self._offsets.append(offset)
        if logprobs is None:
            self._logprobs.append(None)
            self._top.append(None)
            return
        own = max(logprobs.logprob, LOWEST)
        top = {self._tokenizer.token_text(other): max(value, LOWEST) for other, value in logprobs.top}
        top.setdefault(text, own)
        self._logprobs.append(own)
        self._top.append(top)
