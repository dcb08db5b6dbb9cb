from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.tiny_models import make_tiny


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``tiny(family="llama", seed=0)``: the directory of a tiny model."""
    directory = tmp_path_factory.mktemp("models")
    return lambda family="llama", seed=0: make_tiny(directory, family, seed)
