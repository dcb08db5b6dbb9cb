"""The handle of a transfer: all that a puller must know. The router carries it and never reads it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class KvHandle:
    """One transfer on one incarnation of a source. Whoever holds the handle may pull, so it stays inside the
    cluster; ``repr`` leaves the secret out."""

    transfer_id: bytes  # 16 bytes
    secret: bytes  # 16 bytes
    addresses: Mapping[str, str]  # transport name -> "host:port"
    source: str  # worker id
    epoch: int  # incarnation of the source
    fingerprint: bytes  # 32 bytes: model, layout, protocol
    num_blocks: int  # blocks of the whole transfer once computed

    def __repr__(self) -> str:
        return f"KvHandle({self.transfer_id.hex()} on {self.source}@{self.epoch}, {self.num_blocks} blocks)"
