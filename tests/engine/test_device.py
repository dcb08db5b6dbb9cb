"""Which device is chosen, and the one line that says why another one is not."""

from __future__ import annotations

import logging
import re

import pytest
import torch

from engine.device import CpuDevice, Gpu, _problem, choose_device
from engine.memory import OUTSIDE_BYTES, check_free, gpu_blocks
from splitserve.errors import ConfigError
from splitserve.layout import KVLayout

LAYOUT = KVLayout(num_layers=2, num_kv_heads=2, head_dim=64, dtype="bfloat16")
GIB = 1 << 30
without_cuda = pytest.mark.skipif(torch.version.cuda is not None, reason="torch has CUDA here")


def test_the_cpu_always_works() -> None:
    assert isinstance(choose_device("cpu"), CpuDevice)


@without_cuda
def test_auto_takes_the_cpu_where_there_is_no_gpu() -> None:
    assert isinstance(choose_device("auto"), CpuDevice)


@without_cuda
def test_a_torch_without_cuda_is_named() -> None:
    with pytest.raises(ConfigError, match="built without CUDA; --device cpu works everywhere"):
        choose_device("cuda")


def cuda_that_fails(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    """As if torch had been built with CUDA, on a machine where it can't be used."""

    def fail() -> None:
        raise error

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "init", fail)


FAULTS = [
    (RuntimeError("The NVIDIA driver on your system is too old (found version 11040). Please update"), "11040)"),
    (RuntimeError("CUDA error: unknown error\nCompile with `TORCH_USE_CUDA_DSA`"), "CUDA error: unknown error"),
    (torch.cuda.DeferredCudaCallError("CUDA call failed lazily\n\nat:\n\nline"), "CUDA call failed lazily"),
]
ABSENCES = [
    (RuntimeError("Found no NVIDIA driver on your system. Please check that"), "no NVIDIA driver on your system"),
    (RuntimeError("No CUDA GPUs are available"), "No CUDA GPUs are available"),
]


@pytest.mark.parametrize(("error", "said"), FAULTS + ABSENCES)
def test_a_gpu_that_can_not_be_reached_is_one_line(
    monkeypatch: pytest.MonkeyPatch, error: Exception, said: str
) -> None:
    cuda_that_fails(monkeypatch, error)
    with pytest.raises(ConfigError, match=f"{re.escape(said)}; --device cpu works everywhere$") as caught:
        choose_device("cuda")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("error", "said", "level"),
    [(*fault, logging.WARNING) for fault in FAULTS] + [(*absence, logging.INFO) for absence in ABSENCES],
)
def test_auto_warns_of_a_fault_and_not_of_a_machine_without_a_gpu(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: Exception, said: str, level: int
) -> None:
    cuda_that_fails(monkeypatch, error)
    with caplog.at_level(logging.INFO, "engine.device"):
        assert isinstance(choose_device("auto"), CpuDevice)
    [record] = caplog.records
    assert record.levelno == level and record.getMessage().endswith(said)


@pytest.mark.parametrize("name", ["gpu", "cuda:x", "cuda:", ""])
def test_unknown_devices_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="not known"):
        choose_device(name)


@pytest.mark.parametrize(
    ("capability", "fp8", "index", "said"),
    [
        ((7, 5), False, 0, "compute capability 7.5, the oldest that is served is 8.0"),
        ((8, 6), True, 0, "fp8 weights need 8.9"),
        ((9, 0), False, 1, "there are 1 GPUs"),
    ],
)
def test_a_gpu_that_can_not_serve_is_told(capability: tuple[int, int], fp8: bool, index: int, said: str) -> None:
    problem = _problem([Gpu(0, "NVIDIA X", capability)], index, fp8)
    assert problem is not None and said in problem


def test_a_gpu_that_serves_has_no_problem() -> None:
    assert _problem([Gpu(0, "NVIDIA H100", (9, 0))], 0, True) is None


def test_the_pool_takes_what_weights_and_the_largest_step_leave() -> None:
    blocks = gpu_blocks(80 * GIB, 0.5, 16 * GIB, LAYOUT)
    assert blocks == (40 * GIB - 16 * GIB - OUTSIDE_BYTES) // LAYOUT.block_bytes


def test_too_little_gpu_memory_is_one_clear_line() -> None:
    with pytest.raises(ConfigError, match=r"too little GPU memory: .* 16\.6 GiB of the 16\.0 GiB") as caught:
        gpu_blocks(32 * GIB, 0.5, 16 * GIB, LAYOUT)
    assert "\n" not in str(caught.value)


def test_memory_that_others_hold_is_told_with_the_share_that_fits() -> None:
    check_free(72 * GIB, 80 * GIB, 0.9)
    with pytest.raises(ConfigError, match=r"at most 0\.50 fits"):
        check_free(40 * GIB, 80 * GIB, 0.9)
