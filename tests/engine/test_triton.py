"""The engine as it runs on a GPU, with the kernels that run there, in Triton's interpreter: same answers as on the
torch reference, through chunks, decode buckets and drawn tokens."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import triton

from engine import EngineConfig, EngineRequest, SamplingParams, open_model
from engine.core import Engine
from engine.device import CpuDevice
from engine.runner import Runner
from kernels import Kernels, ReferenceKernels
from kernels.triton.backend import TritonKernels
from tests.engine.test_run_ahead import BLOCK_BYTES, drive

pytestmark = pytest.mark.skipif(not triton.knobs.runtime.interpret, reason="Triton compiles here: see test_gpu")


def make(path: Path, kernels: Kernels, *, ahead: bool, kv: str = "auto") -> Engine:
    config = EngineConfig(
        str(path), dtype="float32", kv_cache_dtype=kv, threads=1, kv_cache_memory=40 * BLOCK_BYTES,
        max_num_seqs=2, max_num_batched_tokens=24,
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


class WellRounded(TritonKernels):
    """Triton's interpreter rounds to float8 wrongly: KV is written by the reference, and read by Triton."""

    def rope_kv_write(self, *arguments: Any, **more: Any) -> None:
        ReferenceKernels().rope_kv_write(*arguments, **more)


def test_a_pool_in_fp8_answers_as_on_the_reference(tiny: Callable[..., Path]) -> None:
    greedy = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
    prompt = [(7 * i) % 251 for i in range(38)]
    work = [EngineRequest("two chunks", prompt, greedy), EngineRequest("cached", prompt[:20], greedy)]
    ahead = make(tiny(), WellRounded("cpu"), ahead=True, kv="fp8")
    answers = drive(ahead, list(work))
    assert answers == drive(make(tiny(), ReferenceKernels(), ahead=False, kv="fp8"), list(work))
    assert answers != drive(make(tiny(), ReferenceKernels(), ahead=False), list(work))
    assert ahead.runner.kv.dtype is torch.float8_e4m3fn
