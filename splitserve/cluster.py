"""What processes know of each other: a worker's identity, its capacity and its load.

Workers write these into the directory, routers read them. Plain data; nothing here talks to anyone.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field


class Role(enum.StrEnum):
    PREFILL = "prefill"
    DECODE = "decode"


@dataclass(frozen=True, slots=True)
class WorkerInfo:
    """One incarnation of a worker, fixed from its registration to its end."""

    id: str
    role: Role
    model: str
    fingerprint: str  # hex; model, dtype, block size and layout
    grpc_address: str  # host:port
    block_tokens: int
    num_blocks: int  # size of the KV pool
    max_num_seqs: int  # sequences in one step
    max_model_len: int  # tokens
    epoch: int = 0  # given by the directory at registration
    transfer_addresses: Mapping[str, str] = field(default_factory=dict)  # transport -> host:port
    pid: int = 0
    version: str = ""
    block_bytes: int = 0  # of one KV block; 0 while unknown


@dataclass(frozen=True, slots=True)
class WorkerLoad:
    """What a worker is busy with, measured by itself and rewritten with each heartbeat."""

    num_running: int = 0
    num_waiting: int = 0
    queued_tokens: int = 0  # tokens of prompts, cached ones left out, not yet computed
    used_blocks: int = 0  # blocks that live sequences hold; cached ones count as free
    prefill_tokens_per_second: float = 0.0  # measured; 0 while unknown
    decode_step_seconds: float = 0.0  # recent time of a decode step; 0 while unknown
    decode_sequence_seconds: float = 0.0  # what one more sequence adds to a step; 0 while unknown
    transfer_bytes_per_second: float = 0.0  # measured; 0 while unknown
    draining: bool = False


@dataclass(frozen=True, slots=True)
class WorkerState:
    """A worker as the directory shows it now."""

    info: WorkerInfo
    load: WorkerLoad
    age_seconds: float = 0.0  # of the heartbeat that this state was read from, when it was read
