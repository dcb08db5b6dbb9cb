from __future__ import annotations

import ctypes
import mmap
import time

import pytest

from engine.pages_ahead import PagesAhead

SIZE, AHEAD = 64 << 20, 4 << 20


def resident(memory: memoryview) -> list[bool]:
    """Of each page."""
    pages = (ctypes.c_ubyte * (memory.nbytes // mmap.PAGESIZE))()
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    assert ctypes.CDLL(None).mincore(ctypes.c_void_p(address), ctypes.c_size_t(memory.nbytes), pages) == 0
    return [bool(page & 1) for page in pages]


def until_resident(memory: memoryview, end: int) -> None:
    until = time.monotonic() + 30
    while not all(resident(memory[:end])):
        assert time.monotonic() < until
        time.sleep(0.005)


@pytest.fixture
def memory() -> memoryview:
    mapped = mmap.mmap(-1, SIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    mapped.madvise(mmap.MADV_NOHUGEPAGE)  # else one touch brings in 2 MiB
    return memoryview(mapped)


def test_memory_is_resident_ahead_of_what_is_reached(memory: memoryview) -> None:
    assert not any(resident(memory))
    memory[5000] = 7
    pages = PagesAhead(memory, AHEAD, after=0)
    pages.start()
    until_resident(memory, AHEAD)
    pages.reach(20 << 20)
    until_resident(memory, (20 << 20) + AHEAD)
    pages.close()
    assert not any(resident(memory[32 << 20 :]))
    assert memory[5000] == 7
    memory[5000] = 0
    assert not any(memory[: 8 << 20])


def test_it_ends_with_the_memory(memory: memoryview) -> None:
    pages = PagesAhead(memory, AHEAD, after=0)
    pages.start()
    pages.reach(SIZE - 1)
    until_resident(memory, SIZE)
    pages.reach(SIZE)
    pages.close()


def test_it_waits_until_the_machine_has_started_or_blocks_are_used(memory: memoryview) -> None:
    pages = PagesAhead(memory, AHEAD, after=3600)
    pages.start()
    pages.reach(AHEAD // 4)
    time.sleep(0.1)
    assert not any(resident(memory))
    pages.reach(AHEAD)
    until_resident(memory, 2 * AHEAD)
    pages.close()


def test_it_can_be_closed_before_it_begins(memory: memoryview) -> None:
    pages = PagesAhead(memory, AHEAD, after=3600)
    pages.start()
    pages.close()
    assert not any(resident(memory))


def test_small_steps_do_not_wake_it(memory: memoryview) -> None:
    pages = PagesAhead(memory, AHEAD)
    pages.reach(AHEAD // 4)
    assert not pages._more.is_set()
    pages.reach(AHEAD)
    assert pages._more.is_set()
