"""The engine as it runs on a GPU, with the kernels that run there, in Triton's interpreter: same answers as on the
torch reference, through chunks, decode buckets and drawn tokens."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import triton

from engine import EngineConfig, EngineRequest, SamplingParams, open_model
from engine.core import Engine
from engine.device import CpuDevice
from engine.runner import Runner
from kernels import Kernels, ReferenceKernels
from kernels.triton.backend import TritonKernels
from tests.engine.test_run_ahead import BLOCK_BYTES, drive

pytestmark = pytest.mark.skipif(not triton.knobs.runtime.interpret, reason="Triton compiles here: see test_gpu")


def make(path: Path, kernels: Kernels, *, ahead: bool) -> Engine:
    config = EngineConfig(
        str(path), dtype="float32", threads=1, kv_cache_memory=40 * BLOCK_BYTES, max_num_seqs=2,
        max_num_batched_tokens=24,
    )  # fmt: skip
    files = open_model(path)
    return Engine(config, files, Runner(config, files, CpuDevice(asynchronous=ahead), kernels))


def test_the_whole_engine_on_triton_answers_as_on_the_reference(tiny: Callable[..., Path]) -> None:
    greedy = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True)
    drawn = SamplingParams(temperature=0.8, top_k=20, top_p=0.9, seed=7, max_tokens=2, ignore_eos=True)
    prompt = [(7 * i) % 251 for i in range(38)]
    work = [
        EngineRequest("two chunks", prompt, greedy),
        EngineRequest("short", [5], drawn),
        EngineRequest("cached", prompt[:20], drawn),
    ]
    ahead = make(tiny(), TritonKernels("cpu"), ahead=True)
    reference = make(tiny(), ReferenceKernels(), ahead=False)
    assert drive(ahead, list(work)) == drive(reference, list(work))
    assert ahead.stats.cached_tokens > 0
