"""The engine on a GPU: the answers of the CPU's, through captured graphs and steps queued ahead."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from engine import EngineConfig, open_model
from engine.core import Engine
from engine.runner import Launched
from engine.scheduler import Scheduled
from tests.engine.test_run_ahead import BLOCK_BYTES, drive, requests

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]


def make(path: Path, device: str, kernels: str = "auto") -> Engine:
    config = EngineConfig(
        str(path), dtype="float32", kernels=kernels, device=device, kv_cache_memory=64 * BLOCK_BYTES,
        max_num_seqs=6, max_num_batched_tokens=32,
    )  # fmt: skip
    return Engine(config, open_model(path))


@pytest.mark.parametrize("kernels", ["triton", "reference"])
def test_answers_are_those_of_the_cpu(tiny: Callable[..., Path], kernels: str) -> None:
    work = requests(14, seed=2)
    assert drive(make(tiny(), "cuda", kernels), list(work)) == drive(make(tiny(), "cpu"), list(work))


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
def test_launching_a_step_waits_for_nothing(tiny: Callable[..., Path]) -> None:
    engine = make(tiny(), "cuda")
    drive(engine, requests(14, seed=4))  # all kernels are compiled then
    launch = engine.runner.launch

    def strict(scheduled: Sequence[Scheduled], before: Launched | None = None) -> Launched:
        torch.cuda.set_sync_debug_mode("error")
        try:
            return launch(scheduled, before)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    engine.runner.launch = strict  # type: ignore[method-assign]
    drive(engine, requests(14, seed=4))


def test_the_pool_is_sized_from_what_is_left(tiny: Callable[..., Path]) -> None:
    config = EngineConfig(str(tiny()), device="cuda", gpu_memory_utilization=0.1)
    engine = Engine(config, open_model(tiny()))
    _free, total = torch.cuda.mem_get_info()
    assert 0 < engine.runner.num_blocks * engine.runner.layout.block_bytes < 0.1 * total
    del engine
    gc.collect()
