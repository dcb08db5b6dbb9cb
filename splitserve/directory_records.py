"""How workers and transfers are written in the directory: fields of a Redis hash, each a JSON value.

Knows no Redis. Invariant: a field that this version does not know is ignored, and one that is missing takes
its default, so that processes of neighbouring versions read each other.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import orjson

from splitserve.cluster import Role, WorkerInfo, WorkerLoad, WorkerState

T = TypeVar("T")


class TransferState(enum.StrEnum):
    """How far a transfer is; later ones come later."""

    COMPUTING = "computing"
    READY = "ready"
    PULLED = "pulled"
    RELEASED = "released"

    @property
    def rank(self) -> int:
        return list(TransferState).index(self)


@dataclass(frozen=True, slots=True)
class TransferRecord:
    """What the directory says of one transfer. A writer leaves what it does not know as None."""

    id: bytes  # 16 bytes
    state: TransferState
    source: str | None = None  # worker ids
    destination: str | None = None
    num_blocks: int | None = None


def encode(record: Any) -> list[bytes]:
    """Field, value, field, value … of a dataclass; fields that are None are left out."""
    pairs: list[bytes] = []
    for field in dataclasses.fields(record):
        value = getattr(record, field.name)
        if value is not None:
            pairs += (field.name.encode(), orjson.dumps(value, default=_plain))
    return pairs


def decode_worker(pairs: Sequence[bytes], lease_left_ms: int) -> WorkerState:
    """The worker in a hash read as field, value, … Raises ValueError when it is none."""
    fields = _fields(pairs)
    lease_ms = int(fields.get("lease_ms", 0))
    return WorkerState(
        info=_build(WorkerInfo, fields | {"role": Role(fields.get("role", ""))}),
        load=_build(WorkerLoad, fields),
        age_seconds=max(0, lease_ms - lease_left_ms) / 1000,
    )


def decode_transfer(transfer_id: bytes, pairs: Sequence[bytes]) -> TransferRecord:
    """The transfer in a hash read as field, value, … Raises ValueError when it is none."""
    fields = _fields(pairs)
    known = {"id": transfer_id, "state": TransferState(fields.get("state", ""))}
    return _build(TransferRecord, fields | known)


def _fields(pairs: Sequence[bytes]) -> dict[str, Any]:
    return {name.decode(): orjson.loads(value) for name, value in zip(pairs[::2], pairs[1::2], strict=True)}


def _build(kind: type[T], fields: Mapping[str, Any]) -> T:
    names: Iterable[str] = (field.name for field in dataclasses.fields(cast(Any, kind)))
    try:
        return kind(**{name: fields[name] for name in names if name in fields})
    except TypeError as error:
        raise ValueError(f"not a {kind.__name__}: {error}") from error


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, bytes):
        return value.hex()
    raise TypeError(f"{type(value).__name__} has no place in the directory")
