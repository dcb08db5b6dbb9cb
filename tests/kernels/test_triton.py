"""The Triton backend beyond the contract: what it refuses, and blocks on their way to another worker."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import triton

from kernels import AttentionShape, load_kernels
from kernels.fp8 import quantize_channels
from kernels.triton import transfer
from kernels.triton.backend import TritonKernels
from kernels.triton.rows import quantize_rows
from kernels.triton.tuning import INTERPRETER, Tuning
from kvtransfer.checksums import checksum_words

pytestmark = pytest.mark.skipif(not triton.knobs.runtime.interpret, reason="Triton compiles here")
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


@pytest.mark.parametrize(("first_word", "words"), [(0, 5000), (100, 4500), (4999, 1), (8, 0)])
def test_gathered_blocks_are_those_words_and_scatter_puts_them_back(first_word: int, words: int) -> None:
    pool, blocks = torch.randint(-(2**31), 2**31 - 1, (7, 5000), dtype=torch.int32), torch.tensor([3, 0, 6])
    staged = torch.full((3, words), -1, dtype=torch.int32)
    transfer.gather(pool, blocks, first_word, staged)
    expected = pool[blocks, first_word : first_word + words]
    assert torch.equal(staged, expected)
    other, there = torch.zeros_like(pool), torch.tensor([1, 5, 2])
    transfer.scatter(other, there, first_word, staged)
    assert torch.equal(other[there, first_word : first_word + words], expected)
    assert int((other != 0).sum()) == int((expected != 0).sum())


@pytest.mark.parametrize("words", [1, 2047, 4500])
def test_checksums_on_the_device_are_those_of_the_host(words: int) -> None:
    pool, blocks = torch.randint(-(2**31), 2**31 - 1, (4, 5000), dtype=torch.int32), torch.tensor([3, 1])
    got = transfer.checksums(pool, blocks, 100, words)
    expected = [checksum_words(pool[block, 100 : 100 + words].numpy().data) for block in (3, 1)]
    assert [value % 2**32 for value in got.tolist()] == expected


def test_a_checksum_notices_a_bit_and_a_swap() -> None:
    pool = torch.arange(3000, dtype=torch.int32).repeat(3, 1)
    pool[1, 1234] ^= 1 << 30
    pool[2, 10], pool[2, 11] = 11, 10
    assert len(set(transfer.checksums(pool, torch.arange(3), 0, 3000).tolist())) == 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("rows", "width"), [(1, 16), (5, 576), (3, 1001)])
def test_rows_are_rounded_to_float8_as_the_reference_rounds_them(
    dtype: torch.dtype, rows: int, width: int
) -> None:
    # values that need no rounding: the interpreter loses the carry
    x = torch.randn(rows, width + 7).clamp(-3, 3).to(torch.float8_e4m3fn).float()
    x[:, 0] = torch.tensor([448.0, -448.0])[torch.arange(rows) % 2]
    x = (x * torch.logspace(-5, 3, rows, base=2).unsqueeze(1)).to(dtype)[:, :width]
    rounded, scales = quantize_rows(x)
    expected, expected_scales = quantize_channels(x)
    assert torch.equal(scales, expected_scales)
    assert torch.equal(rounded.view(torch.uint8), expected.view(torch.uint8))


@pytest.mark.filterwarnings("ignore:invalid value encountered")  # numpy, on the way
def test_a_row_that_is_not_finite_has_no_finite_scale_and_zeros_stay_zeros() -> None:
    x = torch.tensor([[1.0, torch.nan, 2.0], [torch.inf, 1.0, 1.0], [0.0, 0.0, 0.0]])
    rounded, scales = quantize_rows(x)
    assert torch.isfinite(scales).tolist() == [False, False, True]
    assert not rounded[2].float().any() and scales[2] > 0
