"""The Triton kernels on a GPU, on shapes that the interpreter is too slow for, against float64."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch
from torch import Tensor

from kernels import AttentionBatch, ReferenceKernels, SampleParams
from kernels.fp8 import Fp8Linear, pack_linear_fp8, quantize_channels
from kernels.interface import KvScales
from kernels.triton import transfer
from kernels.triton.backend import TritonKernels
from kernels.triton.rows import quantize_rows
from kvtransfer.checksums import checksum_words
from tests.kernels.cases import LAYER, PagedCase, exact_rms_norm, exact_rope, paged_case
from tests.kernels.test_contract import SAMPLINGS, exact_sample

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
    pytest.mark.filterwarnings("ignore:.*[Dd]eterminis"),  # not asked for: outputs are poisoned that way
]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
BOUNDS = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-5}
MANY = [(1, 1 + 173 * i % 3000) for i in range(256)]
CONTEXTS = [
    [(1, 1)], [(1, 32_768)], [(1, 31_999), *((1, 17),) * 60], MANY, [(8192, 8192)], [(511, 32_000), (3, 20)],
    [*MANY[:100], *((2 + 7 * i, 90 + 31 * i) for i in range(20))],
]  # fmt: skip


@pytest.fixture(scope="module")
def kernels() -> TritonKernels:
    return TritonKernels("cuda:0")


def to_gpu(case: PagedCase) -> PagedCase:
    tensors = {f.name: getattr(case.batch, f.name) for f in fields(AttentionBatch)}
    moved = {name: value.cuda() for name, value in tensors.items() if isinstance(value, Tensor)}
    q, k, v, kv = (x.cuda() for x in (case.q, case.k, case.v, case.kv))
    return replace(case, batch=replace(case.batch, **moved), q=q, k=k, v=v, kv=kv)


def error(got: Tensor, expected: Tensor) -> float:
    """Relative norm. Infinite where anything is not a number."""
    found = float((got.double() - expected.double()).norm() / expected.double().norm())
    return found if found == found else float("inf")


def check(kernels: TritonKernels, case: PagedCase, **options: object) -> None:
    case = to_gpu(case)
    got = kernels.paged_attention(case.q, case.kv, LAYER, case.batch, case.scale, **options)  # type: ignore[arg-type]
    wide = case.kv if case.kv.dtype is torch.float8_e4m3fn else case.kv.double()
    expected = ReferenceKernels().paged_attention(
        case.q.double(), wide, LAYER, case.batch, case.scale, **options  # type: ignore[arg-type]
    )  # fmt: skip
    assert error(got, expected) < BOUNDS[case.q.dtype]


@pytest.mark.parametrize("sequences", CONTEXTS, ids=range(len(CONTEXTS)))
@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_of_any_number_of_sequences(
    kernels: TritonKernels, sequences: list[tuple[int, int]], dtype: torch.dtype
) -> None:
    check(kernels, paged_case(sequences, kv_heads=2, group=4, head_dim=128, dtype=dtype))


@pytest.mark.parametrize("block_tokens", [16, 32])
@pytest.mark.parametrize("group", [1, 2, 3, 4, 7, 8, 16])
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_of_any_shape(
    kernels: TritonKernels, head_dim: int, group: int, block_tokens: int, dtype: torch.dtype
) -> None:
    sequences = [(1, 1), (1, 700), (1, 4097), (5, 90), (130, 1300)]
    check(kernels, paged_case(sequences, group=group, head_dim=head_dim, block_tokens=block_tokens, dtype=dtype))


@pytest.mark.parametrize(("window", "soft_cap"), [(1, None), (1000, None), (None, 20.0), (333, 2.0)])
def test_attention_within_a_window_and_under_a_cap(
    kernels: TritonKernels, window: int | None, soft_cap: float | None
) -> None:
    sequences = [(1, 1), (1, 4000), (3, 90), (600, 2500)]
    check(kernels, paged_case(sequences, dtype=torch.bfloat16), window=window, soft_cap=soft_cap)


def test_attention_over_a_float8_pool(kernels: TritonKernels) -> None:
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this GPU has no float8")
    sequences = [(1, 1), (1, 4000), (3, 90), (600, 2500)]
    case = paged_case(sequences, group=4, head_dim=128, dtype=torch.bfloat16, kv_dtype=torch.float8_e4m3fn)
    check(kernels, case, kv_scales=KvScales(0.5, 3.0))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [64, 80, 128, 256])
def test_rope_kv_write(kernels: TritonKernels, dtype: torch.dtype, head_dim: int) -> None:
    case = to_gpu(paged_case([(1, 40), (300, 700)], head_dim=head_dim, dtype=dtype))
    angles = torch.rand(1024, head_dim // 2) * 6
    cos_sin = torch.cat((angles.cos(), angles.sin()), dim=1).cuda()
    q, k = (exact_rope(x, cos_sin, case.batch.positions) for x in (case.q, case.k))
    kernels.rope_kv_write(case.q, case.k, case.v, cos_sin, case.kv, LAYER, case.batch)
    assert error(case.q, q) < BOUNDS[dtype] and error(case.k, k) < BOUNDS[dtype]
    blocks, offsets = case.batch.slots // 16, case.batch.slots % 16
    assert torch.equal(case.kv[blocks, :, LAYER, 0, offsets], case.k)
    assert torch.equal(case.kv[blocks, :, LAYER, 1, offsets], case.v)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width"), [(1, 4096), (130, 576), (8192, 4096), (7, 1001)])
def test_norms_and_activation(kernels: TritonKernels, dtype: torch.dtype, rows: int, width: int) -> None:
    x, residual = (torch.randn(rows, width, dtype=dtype, device="cuda") for _ in range(2))
    weight, total = torch.randn(width, dtype=dtype, device="cuda"), x + residual
    assert error(kernels.rms_norm(x, weight, 1e-5), exact_rms_norm(x, weight, 1e-5)) < BOUNDS[dtype]
    got = kernels.add_rms_norm(x, residual, weight, 1e-5)
    assert torch.equal(residual, total)
    assert error(got, exact_rms_norm(total, weight, 1e-5)) < BOUNDS[dtype]
    gate_up = torch.randn(rows, 2 * width, dtype=dtype, device="cuda")
    gate, up = gate_up.double().chunk(2, dim=1)
    assert error(kernels.silu_mul(gate_up), gate * gate.sigmoid() * up) < BOUNDS[dtype]


@pytest.mark.parametrize("vocab", [320, 49_152, 128_256])
def test_sample_draws_as_the_filters_say(kernels: TritonKernels, vocab: int) -> None:
    rows = [sampling for sampling in SAMPLINGS for _ in range(8)]
    temperature, top_k, top_p, min_p = (torch.tensor(x, device="cuda") for x in zip(*rows, strict=True))
    logits = 3 * torch.randn(len(rows), vocab, device="cuda")
    uniform = torch.rand(len(rows), dtype=torch.float64, device="cuda")
    tokens = kernels.sample(logits, SampleParams(temperature, top_k.int(), top_p, min_p, uniform))
    for row, token in enumerate(tokens.tolist()):
        assert token in exact_sample(logits[row].cpu(), rows[row], float(uniform[row])), rows[row]


def test_blocks_are_gathered_scattered_and_checksummed() -> None:
    pool = torch.randint(-(2**31), 2**31 - 1, (64, 524_288), dtype=torch.int32, device="cuda")
    blocks = torch.tensor([63, 0, 17], device="cuda")
    staged = torch.empty(3, 500_000, dtype=torch.int32, device="cuda")
    transfer.gather(pool, blocks, 1000, staged)
    assert torch.equal(staged, pool[blocks, 1000:501_000])
    sums = transfer.checksums(pool, blocks, 1000, 500_000).tolist()
    assert [x % 2**32 for x in sums] == [checksum_words(row.numpy().data) for row in staged.cpu()]
    other = torch.zeros_like(pool)
    transfer.scatter(other, blocks, 1000, staged)
    assert torch.equal(other[blocks, 1000:501_000], staged) and not other[1].any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width"), [(1, 4096), (300, 14_336), (7, 1001)])
def test_rows_are_rounded_to_float8_as_the_reference_rounds_them(
    dtype: torch.dtype, rows: int, width: int
) -> None:
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this GPU has no float8")
    x = torch.randn(rows, width, dtype=dtype, device="cuda")
    (rounded, scales), (expected, expected_scales) = quantize_rows(x), quantize_channels(x)
    assert torch.equal(scales, expected_scales)
    assert torch.equal(rounded.view(torch.uint8), expected.view(torch.uint8))


@pytest.mark.parametrize("rows", [1, 16, 300])
def test_fp8_products_are_those_of_the_rounded_operands(rows: int) -> None:
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this GPU has no float8")
    weight = torch.randn(512, 1024, dtype=torch.bfloat16, device="cuda")
    x = torch.randn(rows, 1024, dtype=torch.bfloat16, device="cuda")
    rounded, scales = quantize_channels(weight)
    got = pack_linear_fp8(rounded, scales, None, torch.bfloat16)(x)
    assert error(got, Fp8Linear(rounded, scales, None, torch.float32)(x)) < 1e-2
