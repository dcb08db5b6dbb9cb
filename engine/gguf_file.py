"""The directory of a GGUF file: metadata and where each tensor lies. https://github.com/ggml-org/ggml/blob/master/docs/gguf.md

Knows the container, neither names nor models. Large arrays (vocabularies) are stepped over and read on demand,
which makes opening a file a matter of milliseconds. Invariant: nothing outside the file is ever read; a file that
says otherwise is a ValueError.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

_MAGIC = 0x46554747
_VERSIONS = (2, 3)
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_LARGE = 1024  # entries of an array that is read on demand
_MOST_DIMENSIONS = 4


@dataclass(frozen=True, slots=True)
class LargeArray:
    """An array that was stepped over."""

    kind: int  # of its entries, as GGUF numbers types
    count: int
    offset: int  # bytes from the start of the file


@dataclass(frozen=True, slots=True)
class StoredTensor:
    kind: int  # as ggml numbers types
    shape: tuple[int, ...]  # values, slowest dimension first
    offset: int  # bytes from the start of the file


class GgufDirectory:
    """Raises ValueError if the file is not GGUF of version 2 or 3, little-endian."""

    def __init__(self, path: Path) -> None:
        with path.open("rb") as file:
            self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._at = 0
        self.fields: dict[str, Any] = {}
        self.large: dict[str, LargeArray] = {}
        try:
            magic, version = self._scalar("I"), self._scalar("I")
            if magic != _MAGIC or version not in _VERSIONS:
                raise ValueError("not a GGUF file of version 2 or 3")
            num_tensors, num_fields = self._scalar("Q"), self._scalar("Q")
            for _ in range(num_fields):
                self._field(self._string(), self._scalar("I"))
            tensors = [self._tensor() for _ in range(num_tensors)]
            alignment = int(self.fields.get("general.alignment", 32))
        except (struct.error, OverflowError, UnicodeDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"a damaged GGUF file: {error!r}") from error
        if alignment < 1:
            raise ValueError(f"a damaged GGUF file: alignment {alignment}")
        start = -(-self._at // alignment) * alignment
        self.tensors: Mapping[str, StoredTensor] = {
            name: StoredTensor(kind, shape, start + offset) for name, kind, shape, offset in tensors
        }

    def data(self, offset: int, size: int) -> NDArray[np.uint8]:
        """``[size]`` bytes of the file, read-only, not copied."""
        if offset + size > len(self._bytes):
            raise ValueError("a damaged GGUF file: a tensor ends behind the end of the file")
        return np.frombuffer(self._bytes, dtype=np.uint8, count=size, offset=offset)

    def string(self, array: LargeArray, index: int) -> str:
        """One entry of an array of strings."""
        if array.kind != _STRING or not 0 <= index < array.count:
            raise IndexError(index)
        self._at = array.offset
        self._skip_strings(index)
        return self._string()

    def _field(self, name: str, kind: int) -> None:
        if kind != _ARRAY:
            self.fields[name] = self._value(kind)
            return
        kind, count = self._scalar("I"), self._scalar("Q")
        if count <= _LARGE:
            self.fields[name] = [self._value(kind) for _ in range(count)]
            return
        self.large[name] = LargeArray(kind, count, self._at)
        if kind == _STRING:
            self._skip_strings(count)
        else:
            self._at += struct.calcsize(_SCALARS[kind]) * count

    def _tensor(self) -> tuple[str, int, tuple[int, ...], int]:
        name, dimensions = self._string(), self._scalar("I")
        if dimensions > _MOST_DIMENSIONS:
            raise ValueError(f"a damaged GGUF file: a tensor of {dimensions} dimensions")
        shape = tuple(self._scalar("Q") for _ in range(dimensions))[::-1]
        return name, self._scalar("I"), shape, self._scalar("Q")

    def _value(self, kind: int) -> Any:
        return self._string() if kind == _STRING else self._scalar(_SCALARS[kind])

    def _scalar(self, code: str) -> Any:
        (value,) = struct.unpack_from("<" + code, self._bytes, self._at)
        self._at += struct.calcsize(code)
        return value

    def _string(self) -> str:
        length = self._scalar("Q")
        if length > len(self._bytes) - self._at:
            raise ValueError("a damaged GGUF file: a text ends behind the end of the file")
        self._at += length
        return self._bytes[self._at - length : self._at].decode()

    def _skip_strings(self, count: int) -> None:
        read, data, at = struct.Struct("<Q").unpack_from, self._bytes, self._at
        for _ in range(count):
            at += 8 + read(data, at)[0]
        self._at = at
