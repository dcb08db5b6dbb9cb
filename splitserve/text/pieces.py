"""What the pieces of a vocabulary stand for.

Vocabularies spell their pieces in two ways. Byte-level ones (GPT-2, Llama 3, Qwen, SmolLM2) write each byte
as a printable character; SentencePiece (Llama 2, Mistral, Gemma) writes spaces as ``▁``, bytes as ``<0x0A>``.
Invariant: where ``concatenates`` is true, the text of any token sequence is the joined bytes of its pieces,
decoded as UTF-8 with one U+FFFD per undecodable part.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class PieceBytes(Protocol):
    """Maps a piece to its bytes."""

    @property
    def concatenates(self) -> bool: ...

    def __call__(self, piece: str) -> bytes: ...


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's table: printable Latin-1 characters stand for themselves, the other bytes for U+0100 and up."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(0x100 + i): b for i, b in enumerate(others)}


@dataclass(frozen=True, slots=True)
class ByteLevelPieces:
    """Pieces in the byte alphabet; a piece with any other character (an added token) is plain text."""

    alphabet: Mapping[str, int] = field(default_factory=_byte_alphabet)
    concatenates: bool = True

    def __call__(self, piece: str) -> bytes:
        try:
            return bytes([self.alphabet[char] for char in piece])
        except KeyError:
            return piece.encode()


@dataclass(frozen=True, slots=True)
class SentencePieces:
    """Pieces with ``▁`` and byte fallback. Not joined plainly: the first one of a text may lose its space."""

    concatenates: bool = False

    def __call__(self, piece: str) -> bytes:
        if match := _BYTE_PIECE.fullmatch(piece):
            return bytes([int(match[1], 16)])
        return piece.replace("▁", " ").encode()


@dataclass(frozen=True, slots=True)
class PlainPieces:
    """Pieces that are their own text (word-level and the like), joined in ways only the decoder knows."""

    concatenates: bool = False

    def __call__(self, piece: str) -> bytes:
        return piece.encode()


def piece_reader(decoder: Mapping[str, Any] | None) -> PieceBytes:
    """Chooses by the ``decoder`` entry of a tokenizer.json."""
    steps = _steps(decoder)
    if steps == ["ByteLevel"]:
        return ByteLevelPieces()
    if "ByteLevel" in steps:
        return ByteLevelPieces(concatenates=False)
    if "ByteFallback" in steps or "Metaspace" in steps:
        return SentencePieces()
    return PlainPieces()


def _steps(decoder: Mapping[str, Any] | None) -> list[str]:
    if decoder is None:
        return []
    if decoder.get("type") == "Sequence":
        return [step for part in decoder.get("decoders", ()) for step in _steps(part)]
    return [str(decoder.get("type"))]
