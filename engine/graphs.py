"""Decode steps captured once for each size of batch and replayed: a replay costs the host one call.

Owns the tensors that captured steps read. Knows no sequences. Invariant: between two replays only those tensors
change, and they change on the device's queue.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from engine.batch import HostBatch, padded
from engine.device import Device
from kernels import AttentionBatch

_FIELDS = ("tokens", "sources", "positions", "slots", "query_start", "context_lens")


def buckets(most: int) -> list[int]:
    """Sizes of captured batches: 1, 2, 4, then every eighth, up to ``most``."""
    return [n for n in (1, 2, 4) if n < most] + list(range(8, most, 8)) + [most]


class DecodeGraphs:
    """``forward(tokens, sources, batch)``: hidden states of one step of decodes. Not logits: each graph keeps its
    result, and those of a large vocabulary would fill GiBs."""

    def __init__(
        self,
        device: Device,
        forward: Callable[[Tensor, Tensor, AttentionBatch], Tensor],
        *,
        most: int,
        max_blocks: int,
        max_context: int,
        scratch_block: int,
        block_tokens: int,
    ) -> None:
        self._scratch_block, self._block_tokens = scratch_block, block_tokens
        self._tables = torch.full((most, max_blocks), scratch_block, dtype=torch.int32, device=device.torch)
        self._steps: dict[int, tuple[dict[str, Tensor], Callable[[], object], Tensor]] = {}
        for rows in reversed(buckets(most)):  # the largest first: the others fit into its memory
            longs = torch.zeros(3, rows, dtype=torch.int64, device=device.torch)
            longs[2] = scratch_block * block_tokens
            inputs = {
                "tokens": longs[0],
                "sources": torch.full((rows,), -1, dtype=torch.int32, device=device.torch),
                "positions": longs[1],
                "slots": longs[2],
                "query_start": torch.arange(rows + 1, dtype=torch.int32, device=device.torch),
                "context_lens": torch.ones(rows, dtype=torch.int32, device=device.torch),
            }
            batch = AttentionBatch(
                positions=inputs["positions"],
                slots=inputs["slots"],
                query_start=inputs["query_start"],
                context_lens=inputs["context_lens"],
                block_tables=self._tables[:rows],
                num_decodes=rows,
                max_query=1,
                max_context=max_context,
            )

            def run(inputs: dict[str, Tensor] = inputs, batch: AttentionBatch = batch) -> Tensor:
                return forward(inputs["tokens"], inputs["sources"], batch)

            self._steps[rows] = (inputs, *device.capture(run))

    def covers(self, batch: HostBatch) -> bool:
        return batch.max_query == 1 and len(batch.tokens) <= max(self._steps)

    def run(self, batch: HostBatch, upload: Callable[[HostBatch], dict[str, Tensor]]) -> Tensor:
        """``[bucket, hidden]``, the batch's T rows first; the next step overwrites them."""
        rows = min(n for n in self._steps if n >= len(batch.tokens))
        inputs, replay, hidden = self._steps[rows]
        found = upload(padded(batch, rows, self._scratch_block, self._block_tokens))
        for name in _FIELDS:
            inputs[name].copy_(found[name])
        tables = found["block_tables"]
        self._tables[:rows, : tables.shape[1]].copy_(tables)
        replay()
        return hidden
