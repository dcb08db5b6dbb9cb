"""Tokens that arrive one by one, as text that never splits a character.

Owns the undecided end of one answer; knows no stop strings. Two ways, chosen by the vocabulary:
where text is the joined bytes of its pieces, an incremental UTF-8 decoder is exact; elsewhere the new text is
the difference of two decodings of a short window, since there a token's text depends on its left neighbour.
Invariant: the pushes and the flush, joined, are the decoding of the whole sequence (in a window, undecodable
bytes may be replaced one by one where the whole would replace their neighbours too).
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from splitserve.text.tokenizer import Tokenizer

_REPLACEMENT = "\ufffd"
_CONTEXT = 5  # tokens of the prompt that the first token of the answer is decoded with
_MAX_UNDECIDED = 8  # tokens; a character has at most four bytes, so more will never become one


class IncrementalDetokenizer:
    """The text of one token sequence, in constant time a token.

    Args:
        tokenizer: the model's.
        context: tokens before the first one that is pushed; their text is not returned.
        skip_special_tokens: leave special tokens out of the text.
    """

    def __init__(
        self, tokenizer: Tokenizer, context: Sequence[int] = (), skip_special_tokens: bool = True
    ) -> None:
        exact = tokenizer.exact_bytes is not None
        self._way: _Bytes | _Window = (
            _Bytes(tokenizer, skip_special_tokens)
            if exact
            else _Window(tokenizer, skip_special_tokens, list(context[-_CONTEXT:]))
        )

    def push(self, token: int) -> str:
        """Text that became certain with ``token``; empty inside a character."""
        return self._way.push(token)

    def flush(self) -> str:
        """The rest, when no token follows: replacement characters for an unfinished character."""
        return self._way.flush()


class _Bytes:
    def __init__(self, tokenizer: Tokenizer, skip_special: bool) -> None:
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_ids if skip_special else frozenset[int]()
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: int) -> str:
        if token in self._skipped:
            return ""
        return self._decoder.decode(self._tokenizer.token_bytes(token))

    def flush(self) -> str:
        return self._decoder.decode(b"", final=True)


class _Window:
    """``tokens[:shown]`` are in the text already; those before ``shown`` only give the rest its context."""

    def __init__(self, tokenizer: Tokenizer, skip_special: bool, context: list[int]) -> None:
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._skipped = tokenizer.special_ids if skip_special else frozenset[int]()
        self._tokens = [token for token in context if token not in self._skipped]
        self._shown = len(self._tokens)

    def push(self, token: int) -> str:
        if token in self._skipped:
            return ""
        self._tokens.append(token)
        return self._take(final=len(self._tokens) - self._shown >= _MAX_UNDECIDED)

    def flush(self) -> str:
        return self._take(final=True)

    def _take(self, final: bool) -> str:
        before = self._tokenizer.decode(self._tokens[: self._shown], self._skip_special)
        after = self._tokenizer.decode(self._tokens, self._skip_special)
        if not final and (len(after) <= len(before) or after.endswith(_REPLACEMENT)):
            return ""
        del self._tokens[: self._shown]
        self._shown = len(self._tokens)
        return after[len(before) :]
