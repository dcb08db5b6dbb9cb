"""A recorded hour of requests: one JSON object a line, as published with Mooncake.

``timestamp`` (ms from the start), ``input_length`` and ``output_length`` (tokens), ``hash_ids`` (one for each
``BLOCK_TOKENS`` tokens of the prompt; an id names a block together with all that comes before it).
Invariant: scaling keeps what is shared; requests that had k blocks in common still have k, of another size.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import orjson

from splitserve.errors import ConfigError

BLOCK_TOKENS = 512


@dataclass(frozen=True, slots=True)
class TraceEntry:
    """One recorded request."""

    time: float  # seconds from the start
    input_tokens: int
    output_tokens: int
    blocks: tuple[int, ...]  # ids of the prompt's blocks; the last may be a partial one
    block_tokens: int = BLOCK_TOKENS

    def scaled(self, lengths: float) -> TraceEntry:
        """The same request with ``lengths`` times the tokens, at least one of each kind."""
        return replace(
            self,
            input_tokens=max(1, round(self.input_tokens * lengths)),
            output_tokens=max(1, round(self.output_tokens * lengths)),
            block_tokens=max(1, round(self.block_tokens * lengths)),
        )


def read_trace(path: Path, limit: int | None = None) -> list[TraceEntry]:
    """The first ``limit`` requests, or all, in order of time. Raises ConfigError."""
    try:
        with path.open("rb") as lines:
            return sorted(_entries(path, islice(lines, limit)), key=lambda entry: entry.time)
    except OSError as error:
        raise ConfigError(f"cannot read the trace {path}: {error.strerror}") from error


def _entries(path: Path, lines: Iterable[bytes]) -> Iterator[TraceEntry]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            fields = orjson.loads(line)
            entry = TraceEntry(
                float(fields["timestamp"]) / 1e3,
                int(fields["input_length"]),
                int(fields["output_length"]),
                tuple(map(int, fields["hash_ids"])),
            )
        except (orjson.JSONDecodeError, KeyError, TypeError, ValueError) as error:
            raise ConfigError(f"{path}:{number} is not a request of a trace: {error}") from error
        if entry.input_tokens < 1 or entry.output_tokens < 1 or entry.time < 0:
            raise ConfigError(f"{path}:{number}: times must not be negative and lengths at least 1")
        yield entry


def copied(entries: Sequence[TraceEntry], copies: int, seed: int) -> list[TraceEntry]:
    """The trace ``copies`` times at once: each beginning elsewhere in it, going round, with blocks of its own."""
    span = max((entry.time for entry in entries), default=0.0)
    highest = max((block for entry in entries for block in entry.blocks), default=0) + 1
    rng = random.Random(seed)
    result = list(entries)
    for copy in range(1, copies):
        shift = rng.uniform(0.0, span)
        result += [
            replace(
                entry,
                time=(entry.time + shift) % span if span else 0.0,
                blocks=tuple(block + copy * highest for block in entry.blocks),
            )
            for entry in entries
        ]
    return sorted(result, key=lambda entry: entry.time)


def turned(entries: Sequence[TraceEntry], seed: int) -> list[TraceEntry]:
    """The trace from another point on, going round; as recorded for seed 0."""
    span = max((entry.time for entry in entries), default=0.0)
    shift = random.Random(seed).uniform(0.0, span) if seed and span else 0.0
    if not shift:
        return list(entries)
    return sorted(
        (replace(entry, time=(entry.time + shift) % span) for entry in entries), key=lambda entry: entry.time
    )


def block_of(blocks: Sequence[int], index: int) -> int:
    """Id of block ``index`` of a prompt; negative numbers for blocks that the trace does not name."""
    return blocks[index] if index < len(blocks) else ~index
