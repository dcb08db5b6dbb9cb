"""A model's tokenizer, built from the bytes that its workers hand out.

Owns encoding, decoding and what one token stands for; knows no requests.
Invariant: immutable after construction, so that threads may share it.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import tokenizers

from splitserve.errors import ConfigError, InvalidRequest
from splitserve.text.pieces import PieceBytes, piece_reader
from splitserve.text.template import ChatTemplate

INLINE_CHARS = 4096  # longer texts are tokenised in a thread, so that the event loop goes on


class Tokenizer:
    """Text to token ids and back.

    Args:
        tokenizer_json: the file of the ``tokenizers`` library.
        chat_template: Jinja source; empty if the model has none.
        special_tokens: what the template may name, such as ``bos_token``.

    Raises:
        ConfigError: the bytes are not a tokenizer.
    """

    def __init__(
        self, tokenizer_json: bytes, chat_template: str = "", special_tokens: Mapping[str, str] | None = None
    ) -> None:
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(tokenizer_json.decode())
            description: dict[str, Any] = json.loads(tokenizer_json)
        except Exception as error:  # the library raises plain Exception for whatever it can't read
            raise ConfigError(f"not a tokenizer.json: {error}") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.template = ChatTemplate(chat_template, special_tokens or {})
        self._reader = piece_reader(description.get("decoder"))
        added = self._tokenizer.get_added_tokens_decoder()
        self._special = frozenset(token for token, entry in added.items() if entry.special)

    @property
    def special_ids(self) -> frozenset[int]:
        """Tokens that stand for no text, such as the end of a turn."""
        return self._special

    @property
    def has_chat_template(self) -> bool:
        return self.template.source != ""

    @property
    def exact_bytes(self) -> PieceBytes | None:
        """How to get a token's bytes if text is nothing but the bytes of all tokens; else ``None``."""
        return self._reader if self._reader.concatenates else None

    @cached_property
    def _longest_token(self) -> int:
        return max(map(len, self._tokenizer.get_vocab()), default=1)

    def at_least(self, text: str) -> int:
        """A lower bound of the number of tokens of ``text``, without tokenising it."""
        return len(text) // self._longest_token

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids; special tokens that the text spells out are recognised.

        Raises:
            InvalidRequest: half a surrogate pair is not text.
        """
        try:
            text.encode()
        except UnicodeEncodeError:
            raise InvalidRequest("the text holds half a surrogate pair", "prompt") from None
        # the batch call releases the interpreter lock while it works, the plain one does not
        batch = self._tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        ids: list[int] = batch[0].ids
        return ids

    async def encode_async(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Like ``encode``, in a thread if the text is long."""
        if len(text) <= INLINE_CHARS:
            return self.encode(text, add_special_tokens)
        return await asyncio.to_thread(self.encode, text, add_special_tokens)

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of ``ids``; ids without a token stand for nothing."""
        text: str = self._tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)
        return text

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
    ) -> str:
        """The conversation as one prompt, special tokens written out.

        Raises:
            InvalidRequest: field ``messages``; the template refuses them, or the model has none.
        """
        return self.template.render(messages, tools, add_generation_prompt)

    def token_bytes(self, token: int) -> bytes:
        """What one token contributes to the text; may be a part of a character. Empty for unknown ids."""
        piece = self._tokenizer.id_to_token(token)
        return b"" if piece is None else self._reader(piece)

    def token_text(self, token: int) -> str:
        """``token_bytes`` as text, with replacement characters for parts of characters."""
        return self.token_bytes(token).decode(errors="replace")
