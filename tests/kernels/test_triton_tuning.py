"""Cuts of the attention kernels: measured ones from a file, and the rule for shapes never seen."""

from __future__ import annotations

import math
import shutil
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kernels import AttentionShape
from kernels.triton.backend import shape_of
from kernels.triton.tune import candidates, tune
from kernels.triton.tuning import FOLDER, Cut, Device, Shape, Tuning, default_decode, default_prefill, file_name

ROOT = Path(__file__).parents[2]
H100 = Device("NVIDIA H100 80GB HBM3", 132, 227 << 10, (9, 0))
LLAMA = AttentionShape(32, 8, 128, 16, torch.bfloat16, torch.bfloat16)
FASTEST = {"decode": Cut(128, 16, 3, 8, 2), "prefill": Cut(64, 64, 1, 4, 3)}


def measure(kernel: str, cut: Cut) -> float:
    """As if one cut were faster than the others, and some did not fit."""
    if cut.stages == 4:
        return math.inf
    return 1e-3 if cut == FASTEST[kernel] else 2e-3


def test_the_tuner_keeps_the_fastest_cut_that_fits(tmp_path: Path) -> None:
    tuning = Tuning(H100)
    assert tune(tuning, LLAMA, measure) == {"decode": 1e-3, "prefill": 1e-3}
    assert tuning.save(tmp_path).name == "nvidia-h100-80gb-hbm3.json"
    again = Tuning.load(H100, tmp_path)
    assert again.decode(shape_of(LLAMA)) == FASTEST["decode"]
    assert again.prefill(shape_of(LLAMA)) == FASTEST["prefill"]


def test_a_shape_never_measured_gets_the_rule(tmp_path: Path) -> None:
    tuning = Tuning(H100)
    tune(tuning, LLAMA, measure)
    tuning.save(tmp_path)
    other = shape_of(replace(LLAMA, head_dim=64))
    assert Tuning.load(H100, tmp_path).decode(other) == default_decode(H100, other)
    unknown = Tuning.load(replace(H100, name="NVIDIA B300"), tmp_path)
    assert unknown.prefill(shape_of(LLAMA)) == default_prefill(H100, shape_of(LLAMA))


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    (tmp_path / file_name(H100.name)).write_text("{}")
    with pytest.raises(ValueError, match=r"nvidia-h100-80gb-hbm3\.json is not a file of kernel tunings"):
        Tuning.load(H100, tmp_path)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float8_e4m3fn"])
@pytest.mark.parametrize("group", [1, 7, 64])
@pytest.mark.parametrize("head_dim", [16, 80, 256])
@pytest.mark.parametrize("shared", [99 << 10, 227 << 10])
def test_the_rule_fits_any_device(head_dim: int, group: int, dtype: str, shared: int) -> None:
    wide = "bfloat16" if dtype == "float8_e4m3fn" else dtype
    shape, device = Shape(head_dim, group, 16, wide, dtype), replace(H100, shared_bytes=shared)
    cut = default_decode(device, shape)
    step = 2 * cut.tokens * shape.padded_dim * getattr(torch, dtype).itemsize
    assert (cut.stages - 1) * cut.programs * step <= shared and cut.rows >= group
    cut = default_prefill(device, shape)
    assert cut.rows >= group and cut.stages >= 1


@pytest.mark.parametrize("kernel", ["decode", "prefill"])
def test_the_rule_is_tried_first(kernel: str) -> None:
    cuts = candidates(kernel, H100, shape_of(LLAMA))
    assert cuts[0] == (default_decode if kernel == "decode" else default_prefill)(H100, shape_of(LLAMA))
    assert len(set(cuts)) == len(cuts)


def test_a_wheel_carries_the_measured_cuts(tmp_path: Path) -> None:
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "kernels" / "triton", tmp_path / "kernels" / "triton")
    Tuning(H100).save(tmp_path / "kernels" / "triton" / FOLDER.name)
    script = "from setuptools.build_meta import build_wheel; build_wheel('.')"
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, timeout=60, check=True)
    [wheel] = tmp_path.glob("*.whl")
    assert f"kernels/triton/tuned/{file_name(H100.name)}" in zipfile.ZipFile(wheel).namelist()
