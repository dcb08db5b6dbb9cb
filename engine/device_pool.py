"""A KV pool in GPU memory as transfers reach it: addresses, copies from and to the host, checksums.

Knows bytes and words, no transport. Copies run on a queue of their own beside the engine's steps, by the
GPU's copy engines. Invariant: what a call was asked for is done when it returns, and a block that the engine has
reported complete is complete here: its step was waited for.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from kernels.triton import transfer

log = logging.getLogger(__name__)


def expandable(environment: Mapping[str, str]) -> bool:
    """Whether torch is told to allocate segments that grow."""
    settings = ",".join(environment.get(name, "") for name in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"))
    return "expandable_segments:true" in settings.replace(" ", "").lower()


class TensorPool:
    """``kv [num_blocks, ...]``, contiguous; on a CPU for tests. Make it in the thread that drives the transports,
    and before they start: UCX works in the CUDA context of its thread."""

    def __init__(self, kv: Tensor) -> None:
        if kv.is_cuda:
            torch.cuda.set_device(kv.device)
            torch.zeros(1, device=kv.device)  # binds the context: set_device alone does nothing for cuda:0
            if expandable(os.environ):
                log.warning(
                    "expandable_segments:True in PYTORCH_CUDA_ALLOC_CONF: other processes can't map such memory, "
                    "so KV blocks don't go by cuda_ipc; leave it out for workers that share a host"
                )
        self.num_blocks = kv.shape[0]
        self._words = kv.view(self.num_blocks, -1).view(torch.int32)  # [num_blocks, words]
        self._bytes = self._words.view(-1).view(torch.uint8)  # [bytes]
        self.block_bytes = self._words.shape[1] * 4
        self._stream = torch.cuda.Stream(kv.device, priority=-1) if kv.is_cuda else None  # type: ignore[no-untyped-call]

    def address(self) -> int:
        return self._bytes.data_ptr()

    def host_buffer(self, num_bytes: int) -> memoryview:
        pinned = self._stream is not None
        return memoryview(torch.empty(num_bytes, dtype=torch.uint8, pin_memory=pinned).numpy())  # type: ignore[arg-type]

    def read(self, offsets: Sequence[int], into: Sequence[memoryview]) -> None:
        with self._queue():
            for offset, buffer in zip(offsets, into, strict=True):
                source = self._bytes[offset : offset + len(buffer)]
                torch.frombuffer(buffer, dtype=torch.uint8).copy_(source, non_blocking=True)
        self._wait()

    def write(self, offsets: Sequence[int], data: Sequence[memoryview]) -> None:
        with self._queue():
            for offset, buffer in zip(offsets, data, strict=True):
                target = self._bytes[offset : offset + len(buffer)]
                target.copy_(torch.frombuffer(buffer, dtype=torch.uint8), non_blocking=True)
        self._wait()

    def device_buffer(self, num_bytes: int) -> tuple[int, Tensor]:
        try:
            with self._queue():  # else it may be memory that a step under way still writes to
                memory = torch.empty(num_bytes // 4, dtype=torch.int32, device=self._words.device)
        except torch.OutOfMemoryError as error:
            raise MemoryError(str(error)) from error
        return memory.data_ptr(), memory

    def gather(self, runs: Sequence[Sequence[int]], into: Sequence[Tensor]) -> None:
        self._move(transfer.gather, runs, into)

    def scatter(self, runs: Sequence[Sequence[int]], data: Sequence[Tensor]) -> None:
        self._move(transfer.scatter, runs, data)

    def _move(
        self,
        move: Callable[[Tensor, Tensor, int, Tensor], None],
        runs: Sequence[Sequence[int]],
        buffers: Sequence[Tensor],
    ) -> None:
        words = self._words.shape[1]
        with self._queue():
            for blocks, buffer in zip(runs, buffers, strict=True):
                ids = torch.tensor(blocks, dtype=torch.int64).to(self._words.device)
                move(self._words, ids, 0, buffer[: len(blocks) * words].view(len(blocks), words))
        self._wait()

    def checksums(self, blocks: Sequence[int], offset: int, length: int) -> list[int]:
        assert offset % 4 == length % 4 == 0
        with self._queue():
            ids = torch.tensor(blocks, dtype=torch.int64).to(self._words.device)
            sums = transfer.checksums(self._words, ids, offset // 4, length // 4).tolist()
        return [value % 2**32 for value in sums]

    def _queue(self) -> AbstractContextManager[object]:
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

    def _wait(self) -> None:
        if self._stream is not None:
            self._stream.synchronize()
