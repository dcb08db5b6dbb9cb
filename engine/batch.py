"""One step's rows as arrays on the host: tokens, their places, and what the kernels need of the sequences.

Knows sequences and block tables, no device. Rows of a step are grouped by sequence, single rows first.
Invariant: padding rows write to the scratch block only, and no other row reads it.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from engine.scheduler import Scheduled
from engine.sequence import Sequence

Ints = NDArray[np.int32]
Longs = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class HostBatch:
    """T rows of S sequences; see `kernels.AttentionBatch` for the places."""

    tokens: Longs  # [T]; 0 where the token is not known yet
    sources: Ints  # [T], row among the tokens that the step before draws, where it is not known; else -1
    positions: Longs  # [T]
    slots: Longs  # [T]
    query_start: Ints  # [S + 1]
    context_lens: Ints  # [S]
    block_tables: Ints  # [S, most blocks of a sequence]
    last_rows: Longs  # [sequences that sample], the row of each that predicts
    num_decodes: int
    max_query: int
    max_context: int


def host_batch(
    ordered: SequenceOf[Scheduled], block_tokens: int, drawn: Mapping[Sequence, int] | None = None
) -> HostBatch:
    """``ordered``: single rows first. ``drawn``: rows of the tokens that the step before brings."""
    counts = np.array([item.num_tokens for item in ordered], dtype=np.int32)
    starts = np.array([item.start for item in ordered], dtype=np.int64)
    query_start = np.zeros(len(ordered) + 1, dtype=np.int32)
    np.cumsum(counts, out=query_start[1:])
    tables = np.zeros((len(ordered), max(len(item.sequence.blocks) for item in ordered)), dtype=np.int32)
    tokens: list[int] = []
    sources = np.full(int(query_start[-1]), -1, dtype=np.int32)
    for i, item in enumerate(ordered):
        sequence = item.sequence
        tables[i, : len(sequence.blocks)] = sequence.blocks
        tokens += sequence.tokens[item.start : item.end]
        if item.end > len(sequence.tokens):
            assert drawn is not None and item.end == len(sequence.tokens) + 1
            sources[len(tokens)] = drawn[sequence]
            tokens.append(0)
    owner = np.repeat(np.arange(len(ordered)), counts)
    positions = np.arange(len(tokens), dtype=np.int64) - query_start[owner] + starts[owner]
    slots = tables[owner, positions // block_tokens].astype(np.int64) * block_tokens + positions % block_tokens
    contexts = (starts + counts).astype(np.int32)
    return HostBatch(
        tokens=np.array(tokens, dtype=np.int64),
        sources=sources,
        positions=positions,
        slots=slots,
        query_start=query_start,
        context_lens=contexts,
        block_tables=tables,
        last_rows=np.array([query_start[i + 1] - 1 for i, item in enumerate(ordered) if item.samples], np.int64),
        num_decodes=int((counts == 1).sum()),
        max_query=int(counts.max()),
        max_context=int(contexts.max()),
    )


def padded(batch: HostBatch, rows: int, scratch_block: int, block_tokens: int) -> HostBatch:
    """A step of decodes with rows of no sequence up to ``rows``, at the first slot of ``scratch_block``."""
    more = rows - len(batch.tokens)
    assert more >= 0 and batch.max_query == 1 and batch.num_decodes == len(batch.tokens)

    def longer(values: NDArray[np.generic], fill: int) -> NDArray[np.generic]:
        return np.concatenate((values, np.full((more, *values.shape[1:]), fill, dtype=values.dtype)))

    return HostBatch(
        tokens=longer(batch.tokens, 0),  # type: ignore[arg-type]
        sources=longer(batch.sources, -1),  # type: ignore[arg-type]
        positions=longer(batch.positions, 0),  # type: ignore[arg-type]
        slots=longer(batch.slots, scratch_block * block_tokens),  # type: ignore[arg-type]
        query_start=np.arange(rows + 1, dtype=np.int32),
        context_lens=longer(batch.context_lens, 1),  # type: ignore[arg-type]
        block_tables=longer(batch.block_tables, scratch_block),  # type: ignore[arg-type]
        last_rows=batch.last_rows,
        num_decodes=rows,
        max_query=1,
        max_context=batch.max_context,
    )
