"""Carries a step's arrays to the device and its tokens back, without waiting for either.

Owns pinned memory, two sets in turn: while the device reads one, the next step is written to the other.
Invariant: a set is written again only after the step that read it was collected.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.batch import HostBatch
from engine.device import Device

_ALIGN = 16  # bytes
_NAMES = [f.name for f in fields(HostBatch) if f.name not in ("num_decodes", "max_query", "max_context")]
_NUMBER_BYTES = 64  # of one sequence's sampling numbers, with room


class Staging:
    """For steps of at most so many rows and sequences."""

    def __init__(self, device: Device, rows: int, sequences: int, max_blocks: int) -> None:
        self._device = device
        if not device.asynchronous:
            return
        size = rows * 32 + sequences * (4 * max_blocks + 32) + 1024
        self._batches = [device.host_buffer(size) for _ in range(2)]
        self._numbers = [device.host_buffer(sequences * _NUMBER_BYTES + 1024) for _ in range(2)]
        self._results = [device.host_buffer(sequences * 16) for _ in range(2)]

    def upload(self, batch: HostBatch) -> dict[str, Tensor]:
        arrays: list[NDArray[np.generic]] = [getattr(batch, name) for name in _NAMES]
        if not self._device.asynchronous:
            return dict(zip(_NAMES, map(torch.from_numpy, arrays), strict=True))
        self._batches.reverse()
        return dict(zip(_NAMES, self._copy(arrays, self._batches[0]), strict=True))

    def upload_numbers(self, arrays: Sequence[NDArray[np.generic]]) -> list[Tensor]:
        if not self._device.asynchronous:
            return [torch.from_numpy(array) for array in arrays]
        self._numbers.reverse()
        return self._copy(arrays, self._numbers[0])

    def read_back(self, tokens: Tensor) -> Tensor:
        """A copy of ``tokens [2, sequences]`` on the host, filled once the device has come so far."""
        self._results.reverse()
        result = self._results[0].view(torch.int64)[: tokens.numel()].view(tokens.shape)
        return result.copy_(tokens, non_blocking=True)

    def _copy(self, arrays: Sequence[NDArray[np.generic]], buffer: Tensor) -> list[Tensor]:
        """All of them in one copy."""
        starts, end = [], 0
        host = buffer.numpy()
        for array in arrays:
            starts.append(end)
            host[end : end + array.nbytes] = array.reshape(-1).view(np.uint8)
            end = -(-(end + array.nbytes) // _ALIGN) * _ALIGN
        there = buffer[:end].to(self._device.torch, non_blocking=True, copy=True)
        return [
            there[start : start + array.nbytes].view(torch.from_numpy(array).dtype).view(array.shape)
            for start, array in zip(starts, arrays, strict=True)
        ]
