"""Parts of the GPU benchmark run on tiny shapes in Triton's interpreter; one that fails stops none."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest
import torch
import triton

from bench.gpu.__main__ import PARTS, limited, measure
from bench.gpu.measure import Bench, Line
from bench.gpu.scale import TINY

SLOW = ("steps", "equality", "transfer", "streams", "generate")
pytestmark = pytest.mark.skipif(not triton.knobs.runtime.interpret, reason="Triton compiles here")


@pytest.fixture(scope="module")
def bench() -> Bench:
    return Bench(TINY, torch.device("cpu"))


@pytest.mark.parametrize("part", PARTS)
def test_a_part_gives_its_rows(bench: Bench, part: str) -> None:
    if part in SLOW and not os.environ.get("SPLITSERVE_BENCH_GPU"):
        pytest.skip("takes half a minute: set SPLITSERVE_BENCH_GPU")
    lines = measure(bench, [part])
    assert lines and not any("failed" in line.value for line in lines)
    checked = [line for line in lines if "error" in line.what or "equal" in line.what]
    assert all(meets(line) for line in checked if line.target is not None), checked


def meets(line: Line) -> bool:
    assert line.ratio is not None and line.target is not None
    return line.ratio <= line.target if line.most else line.ratio >= line.target


def test_a_part_has_so_much_time_and_later_ones_what_is_left(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(TimeoutError), limited(0.05):
        time.sleep(60)
    monkeypatch.setattr("bench.gpu.__main__.SECONDS", 0.0)
    assert [line.value for line in measure(bench, ["ceilings"])] == ["left out: no time"]


def test_a_peer_that_fails_costs_its_row_alone(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flashinfer", ModuleType("flashinfer"))  # without what is called
    values = {line.what: line.value for line in measure(bench, ["decode-attention"])}
    assert values["the same / FlashInfer"] == "it failed: AttributeError"
    assert "decode attention over fp8 KV / copy" in values


def test_a_part_that_fails_is_a_row_and_the_others_go_on(
    bench: Bench, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = Bench(TINY, torch.device("cpu"))
    broken.results = None  # type: ignore[assignment]
    broken.scale = None  # type: ignore[assignment]
    lines = measure(broken, ["ceilings", "tuning"], tmp_path / "out.json")
    assert [line.value for line in lines] == ["failed: see the traceback"] * 2
    assert "Traceback" in capsys.readouterr().err
    assert [Line(**row) for row in json.loads((tmp_path / "out.json").read_text())] == lines
