from __future__ import annotations

import gc

import psutil
import torch

from kernels.memory import HUGE_PAGE, Arena, zeros


def test_memory_is_zero_begins_at_a_huge_page_and_is_taken_when_it_is_written() -> None:
    before = psutil.Process().memory_info().rss
    memory = zeros(1 << 30)
    assert memory.shape == (1 << 30,) and memory.dtype is torch.uint8
    assert memory.data_ptr() % HUGE_PAGE == 0
    assert int(memory[-1]) == 0
    memory[5] = 1
    assert psutil.Process().memory_info().rss - before < 64 << 20


def test_tensors_of_an_arena_do_not_overlap() -> None:
    arena = Arena()
    tensors = [arena.empty(count, dtype) for count in (1, 3000, 70_000) for dtype in (torch.uint8, torch.bfloat16)]
    for i, tensor in enumerate(tensors):
        tensor.fill_(i)
        assert tensor.data_ptr() % 4096 == 0
    assert all(bool((tensor == i).all()) for i, tensor in enumerate(tensors))


def test_what_is_larger_than_a_chunk_gets_its_own_and_a_chunk_ends_with_its_tensors() -> None:
    arena = Arena()
    before = psutil.Process().memory_info().vms
    large = arena.empty(300 << 20, torch.uint8)
    large[-1] = 7
    assert int(large[-1]) == 7
    assert psutil.Process().memory_info().vms - before >= 300 << 20
    del large, arena
    gc.collect()
    assert psutil.Process().memory_info().vms - before < 64 << 20
