"""The thread pool on cores of other processes: takes free ones, leaves at once, and the results are the same."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kernels import Linear, SpareCores
from kernels.cpu.backend import CpuKernels
from kernels.cpu.build import BuildError

ME, OTHER = 7, 8
WORKING, BORROWER, CALLS, FETCHED = 0, 1, 2, 3
CORE = max(os.sched_getaffinity(0))
pytestmark = pytest.mark.skipif(
    len(os.sched_getaffinity(0)) < 2, reason="there is one core, and it is the caller's"
)


class Borrower:
    """Kernels on one thread and one spare core, and a layer to call."""

    def __init__(self, core: int) -> None:
        self.table = torch.zeros(max(CORE, core) + 1, 16, dtype=torch.int32)
        self.row: Tensor = self.table[core]
        self.kernels = CpuKernels(threads=1, spare=SpareCores((core,), self.table, ME))
        weight = torch.randn(2048, 256)
        self.x = torch.randn(4, 256)
        self.layer: Linear = self.kernels.pack_linear(weight, None)
        alone = CpuKernels(threads=1)
        self.expected = alone.pack_linear(weight, None)(self.x)
        alone.close()

    def call(self, times: int = 100) -> int:
        """How many of these calls the spare core has joined."""
        before = int(self.row[CALLS])
        for _ in range(times):
            assert torch.equal(self.layer(self.x), self.expected)
        return int(self.row[CALLS]) - before

    def call_until_joined(self) -> None:
        until = time.monotonic() + 30
        while self.call() == 0:
            assert time.monotonic() < until, "the spare core never joined"


@pytest.fixture
def borrower() -> Iterator[Borrower]:
    try:
        borrower = Borrower(CORE)
    except BuildError as error:
        pytest.skip(str(error))
    yield borrower
    borrower.kernels.close()


def wait_for(row: Tensor, column: int, value: int) -> None:
    until = time.monotonic() + 30
    while int(row[column]) != value:
        assert time.monotonic() < until
        time.sleep(0.001)


def test_a_free_core_is_used_and_given_back(borrower: Borrower) -> None:
    borrower.call_until_joined()
    wait_for(borrower.row, BORROWER, 0)
    assert int(borrower.row[WORKING]) == 0  # the owner's alone to write


def test_a_core_whose_owner_works_is_left_alone_and_taken_again_afterwards(borrower: Borrower) -> None:
    borrower.call_until_joined()
    borrower.row[WORKING] = 1
    wait_for(borrower.row, BORROWER, 0)  # asleep: the calls from now on find it so
    assert borrower.call(300) == 0
    borrower.row[WORKING] = 0
    borrower.call_until_joined()


def test_a_core_is_lent_to_one_at_a_time(borrower: Borrower) -> None:
    borrower.row[BORROWER] = OTHER
    assert borrower.call(300) == 0
    assert int(borrower.row[BORROWER]) == OTHER
    borrower.row[BORROWER] = 0
    borrower.call_until_joined()


def test_what_a_process_borrowed_before_it_was_killed_is_its_own_when_it_comes_back(borrower: Borrower) -> None:
    borrower.row[BORROWER] = ME
    borrower.call_until_joined()


def test_a_core_that_the_process_may_not_use_is_done_without() -> None:
    try:
        borrower = Borrower(1000)
    except BuildError as error:
        pytest.skip(str(error))
    assert borrower.call(300) == 0
    borrower.kernels.close()


def homes() -> list[set[int]]:
    """Where each thread of this process may run."""
    found = []
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(ProcessLookupError):
            found.append(os.sched_getaffinity(int(task.name)))
    return found


def test_what_others_push_aside_is_ended_on_the_callers_core(borrower: Borrower) -> None:
    large = borrower.kernels.pack_linear(torch.randn(16384, 1024), None)
    x = torch.randn(8, 1024)
    expected = large(x)
    borrower.call_until_joined()
    pin = f"import os; os.sched_setaffinity(0, [{CORE}])"
    with subprocess.Popen([sys.executable, "-c", f"{pin}\nwhile True: pass"]) as crowd:
        try:
            until = time.monotonic() + 60
            while int(borrower.row[FETCHED]) == 0:
                assert torch.equal(large(x), expected)
                assert time.monotonic() < until, "nothing was ever fetched"
        finally:
            crowd.kill()
    borrower.call_until_joined()
    until = time.monotonic() + 30
    while {CORE} not in homes():  # it goes home behind its last item
        borrower.call()
        assert time.monotonic() < until, "it never came home"


def test_an_idle_borrower_uses_no_cpu(borrower: Borrower) -> None:
    borrower.call_until_joined()
    before = time.process_time()
    time.sleep(0.5)
    assert time.process_time() - before < 0.05
