"""API keys: who may ask, and under which name.

Owns parsing, hashing and comparing; knows neither HTTP nor gRPC. Only digests are kept: a key is text of the
owner's choosing with much entropy, so one round of SHA-256 is enough and costs a microsecond a request.
Invariant: the time that a refusal takes says nothing of which key was nearly right, or of where it differs.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from splitserve.errors import ConfigError, Unauthenticated

MAX_KEY_CHARS = 512
MAX_NAME_CHARS = 64
_DIGEST = "sha256:"


@dataclass(frozen=True, slots=True)
class ApiKey:
    """``name`` is the tenant: keys of one name share its prefix cache. ``digest``: SHA-256 of the key, in hex."""

    name: str
    digest: str

    @classmethod
    def of(cls, key: str, name: str | None = None) -> Self:
        """From the key itself; the default name is made of its digest, so that it never goes to another key.
        Raises ConfigError."""
        if not 0 < len(key) <= MAX_KEY_CHARS or not key.isascii() or not key.isprintable() or " " in key:
            raise ConfigError(f"an API key is 1 to {MAX_KEY_CHARS} printable ASCII characters without spaces")
        digest = hashlib.sha256(key.encode()).hexdigest()
        return cls(name or f"key-{digest[:12]}", digest)


class Keyring:
    """The keys of one process; false when there are none, and then everybody may ask."""

    def __init__(self, keys: Sequence[ApiKey] = ()) -> None:
        self._keys = tuple((key.name, bytes.fromhex(key.digest)) for key in keys)

    def __bool__(self) -> bool:
        return bool(self._keys)

    def tenant(self, authorization: str | None) -> str:
        """The name behind an ``Authorization`` header; empty if no keys are set. Raises Unauthenticated."""
        if not self._keys:
            return ""
        scheme, _, key = (authorization or "").partition(" ")
        if scheme.lower() != "bearer":
            raise Unauthenticated("an API key is needed: send the header 'Authorization: Bearer KEY'")
        given = hashlib.sha256(key.strip().encode(errors="replace")).digest()
        found = ""
        for name, digest in self._keys:  # always all of them
            if hmac.compare_digest(given, digest):
                found = name
        if not found:
            raise Unauthenticated("the API key is not valid")
        return found


def new_key() -> str:
    """A key that nobody can guess."""
    return "sk-" + secrets.token_urlsafe(32)


def read_keys(path: Path) -> tuple[ApiKey, ...]:
    """Keys of a file: one ``NAME KEY`` a line, or ``NAME sha256:DIGEST``; ``#`` begins a comment.

    Raises ConfigError, which names the line and never shows what stands there.
    """
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the key file {path} can't be read: {error}") from error
    keys = []
    for number, line in enumerate(lines, 1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        if len(words) != 2 or len(words[0]) > MAX_NAME_CHARS or not words[0].isprintable():
            raise ConfigError(f"{path}, line {number}: expected NAME KEY or NAME {_DIGEST}DIGEST")
        try:
            keys.append(_parse(*words))
        except ConfigError as error:
            raise ConfigError(f"{path}, line {number}: {error}") from error
    if not keys:
        raise ConfigError(f"the key file {path} holds no key")
    return tuple(keys)


def _parse(name: str, key: str) -> ApiKey:
    if not key.startswith(_DIGEST):
        return ApiKey.of(key, name)
    digest = key.removeprefix(_DIGEST).lower()
    if len(digest) != 64 or set(digest) - set("0123456789abcdef"):
        raise ConfigError("a SHA-256 digest has 64 hexadecimal digits")
    return ApiKey(name, digest)
