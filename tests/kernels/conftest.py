"""Kernel tests see other data in every run, and memory that nobody wrote holds no zeros."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def _fresh_data() -> None:
    seed = int(os.environ.get("SPLITSERVE_SEED") or random.SystemRandom().randrange(2**31))
    print(f"the same data again: SPLITSERVE_SEED={seed}")  # shown if the test fails
    torch.manual_seed(seed)


@pytest.fixture(autouse=True)
def _poisoned_outputs() -> Iterator[None]:
    """What torch allocates is NaN, or the largest integer, until a kernel writes to it."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
