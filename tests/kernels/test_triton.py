"""The Triton backend beyond the contract: what it refuses."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from kernels import AttentionShape, load_kernels
from kernels.triton.backend import TritonKernels
from kernels.triton.tuning import INTERPRETER, Tuning

LLAMA = AttentionShape(32, 8, 128, 16, torch.bfloat16, torch.bfloat16)


@pytest.mark.parametrize(
    ("shape", "said"),
    [
        (replace(LLAMA, head_dim=512), "head sizes up to 256, not 512; --kernels reference serves any"),
        (replace(LLAMA, head_dim=33), "not 33"),
        (replace(LLAMA, num_heads=30), "can't share 8 KV heads evenly"),
        (replace(LLAMA, num_heads=128, num_kv_heads=1), "not 128"),
        (replace(LLAMA, dtype=torch.float64), "serves float64 models"),
        (replace(LLAMA, kv_dtype=torch.int8), "KV in int8"),
    ],
)
def test_attention_that_no_kernel_serves_is_refused(shape: AttentionShape, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        TritonKernels("cpu").check(shape)


def test_fp8_kv_needs_a_gpu_that_has_it() -> None:
    shape = replace(LLAMA, kv_dtype=torch.float8_e4m3fn)
    TritonKernels("cpu").check(shape)
    with pytest.raises(ValueError, match="has no float8"):
        TritonKernels("cpu", Tuning(replace(INTERPRETER, capability=(8, 0)))).check(shape)


def test_kernels_of_the_cpu_are_refused_on_a_gpu() -> None:
    with pytest.raises(ValueError, match="run on the CPU, not on cuda:0"):
        load_kernels("cuda:0", "cpu")
