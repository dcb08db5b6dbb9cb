from __future__ import annotations

import os
from pathlib import Path

import pytest

from splitserve import children


@pytest.mark.parametrize(("refusals", "asked"), [(0, 1), (2, 3), (10**6, children._TRIES)])
async def test_a_group_that_may_not_change_yet_is_asked_for_again_but_not_for_ever(
    monkeypatch: pytest.MonkeyPatch, refusals: int, asked: int
) -> None:
    written: list[str] = []

    def write(_path: Path, text: str) -> None:
        written.append(text)
        if len(written) <= refusals:
            raise BlockingIOError

    async def at_once(_seconds: float) -> None:
        return

    monkeypatch.setattr(children, "_write", write)
    monkeypatch.setattr(children.asyncio, "sleep", at_once)
    await children._calm_group(os.getpid())
    assert written == [str(children._worker_niceness())] * asked


async def test_a_process_that_has_ended_has_no_group(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Path] = []

    def write(path: Path, _text: str) -> None:
        asked.append(path)
        raise FileNotFoundError

    monkeypatch.setattr(children, "_write", write)
    await children._calm_group(12345)
    assert asked == [Path("/proc/12345/autogroup")]
