"""The command line as a user runs it: a process, its exit code and its two streams."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.tiny_models import make_tiny

COMMAND = (sys.executable, "-m", "splitserve")


def environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """This process's, without what would set flags."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("SPLITSERVE_") or k == "SPLITSERVE_CACHE"}
    return kept | dict(extra or {})


def splitserve(
    *arguments: str, env: Mapping[str, str] | None = None, timeout: float = 150
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *arguments],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=timeout,
        env=environment(env),
        check=False,
    )


def refusal(done: subprocess.CompletedProcess[str]) -> str:
    """What a refused command said: one line, exit code 1, nothing else."""
    assert (done.returncode, done.stdout) == (1, ""), done.stderr
    [line] = done.stderr.splitlines()
    assert line.startswith("splitserve: ")
    return line.removeprefix("splitserve: ")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("models"))
