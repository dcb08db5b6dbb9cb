"""Every backend against float64: what the engine may rely on, whichever backend it got."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
import triton
from torch import Tensor

from kernels import Kernels, ReferenceKernels, SampleParams
from kernels.cpu.backend import CpuKernels
from kernels.cpu.build import BuildError, runnable_isas
from kernels.interface import KvScales
from kernels.triton.backend import TritonKernels
from tests.kernels.cases import LAYER, PagedCase, exact_attention, exact_rms_norm, exact_rope, paged_case

Make = Callable[[], Kernels]
# A further backend joins all tests below with a line here.
BACKENDS: dict[str, Make] = {
    "reference": ReferenceKernels,
    **{f"cpu-{isa}": lambda isa=isa: CpuKernels(isa=isa, threads=1) for isa in runnable_isas()},
    "triton": lambda: TritonKernels("cpu"),  # in the interpreter
    "cpu-threads": lambda: CpuKernels(threads=3),
}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LONG = (
    "test_attention_of_a_mixed_batch", "test_attention_of_one_chunk", "test_attention_of_many_sequences",
    "test_attention_with_scores_far_apart_does_not_overflow",
)  # fmt: skip


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "dtype" not in metafunc.fixturenames:
        metafunc.parametrize("kernels", BACKENDS, indirect=True, scope="module")
        return
    test = metafunc.function.__name__
    pairs = [(name, dtype) for name in BACKENDS for dtype in DTYPES if serves(name, dtype, test)]
    ids = [f"{name}-{str(dtype).removeprefix('torch.')}" for name, dtype in pairs]
    metafunc.parametrize(("kernels", "dtype"), pairs, ids=ids, indirect=["kernels"], scope="module")


def serves(name: str, dtype: torch.dtype, test: str) -> bool:
    """The native CPU kernels leave float16 to the reference.
    Triton is slow in its interpreter: its longest tests do without it."""
    return dtype is not torch.float16 or not (name.startswith("cpu") or (name == "triton" and test in LONG))


@pytest.fixture(scope="module")
def kernels(request: pytest.FixtureRequest) -> Kernels:
    if request.param == "triton" and not triton.knobs.runtime.interpret:
        pytest.skip("Triton compiles here: see test_triton_gpu")
    try:
        return BACKENDS[request.param]()
    except BuildError as error:
        pytest.skip(str(error))


def assert_near(got: Tensor, exact: Tensor, terms: int = 1) -> None:
    """Within a few roundings of the dtype; ``terms`` is how many products of unit size were summed. For 1,536 of
    them the bound of float32 is six standard deviations of a sum in order."""
    assert got.shape == exact.shape
    bound = {torch.float32: 6e-6, torch.bfloat16: 1.2e-2, torch.float16: 1.5e-3}[got.dtype]
    torch.testing.assert_close(got.double(), exact, rtol=bound, atol=bound * terms**0.5)


def assert_same_bits(got: Tensor, expected: Tensor) -> None:
    bits = {2: torch.int16, 4: torch.int32}[got.element_size()]
    assert torch.equal(got.view(bits), expected.view(bits))


@pytest.mark.parametrize("rows", [1, 2, 3, 5, 12, 13, 16, 17, 33, 70, 300])
def test_linear_multiplies_any_number_of_rows(kernels: Kernels, dtype: torch.dtype, rows: int) -> None:
    n, k = 96, 160
    weight, bias, x = torch.randn(n, k).to(dtype), torch.randn(n).to(dtype), torch.randn(rows, k).to(dtype)
    got = kernels.pack_linear(weight, bias)(x)
    assert got.dtype is dtype
    assert got.is_contiguous()
    assert_near(got, x.double() @ weight.double().T + bias.double(), terms=k)


@pytest.mark.parametrize(("n", "k"), [(1, 2), (31, 34), (100, 70), (33, 576), (576, 1536), (8, 33)])
def test_linear_takes_any_shape(kernels: Kernels, dtype: torch.dtype, n: int, k: int) -> None:
    weight = torch.randn(n, k).to(dtype)
    linear = kernels.pack_linear(weight, None)
    for rows in (1, 7, 40):
        x = torch.randn(rows, k).to(dtype)
        assert_near(linear(x), x.double() @ weight.double().T, terms=k)


def test_linear_reads_strided_rows(kernels: Kernels, dtype: torch.dtype) -> None:
    weight, wide = torch.randn(64, 96).to(dtype), torch.full((9, 200), torch.nan, dtype=dtype)
    x = wide[:, 50:146]
    x.copy_(torch.randn(9, 96))
    assert_near(kernels.pack_linear(weight, None)(x), x.double() @ weight.double().T, terms=96)
    odd = torch.randn(9, 97).to(dtype)[:, 1:]
    assert_near(kernels.pack_linear(weight, None)(odd), odd.double() @ weight.double().T, terms=96)


def test_linear_of_no_rows_is_empty(kernels: Kernels, dtype: torch.dtype) -> None:
    assert kernels.pack_linear(torch.randn(64, 32).to(dtype), None)(torch.empty(0, 32, dtype=dtype)).shape == (
        0,
        64,
    )


@pytest.mark.parametrize(("n", "k"), [(100, 64), (33, 70), (192, 576)])
def test_linear_gives_float32_when_asked(kernels: Kernels, dtype: torch.dtype, n: int, k: int) -> None:
    weight, bias = torch.randn(n, k).to(dtype), torch.randn(n).to(dtype)
    linear = kernels.pack_linear(weight, bias, torch.float32)
    for rows in (1, 7, 40):
        x = torch.randn(rows, k).to(dtype)
        got = linear(x)
        assert got.dtype is torch.float32
        assert_near(got, x.double() @ weight.double().T + bias.double(), terms=k)


def near_int8(n: int, k: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A weight, and what it is when rounded to int8; no value lies so that it could go either way."""
    exact = torch.randint(-126, 127, (n, k)).double()
    exact[:, 0] = 127
    off = 0.0 if dtype is torch.bfloat16 else 0.8 * torch.rand(n, k) - 0.4
    weight = exact + off
    weight[:, 0] = 127
    return (weight / 64).to(dtype), exact / 64


@pytest.mark.parametrize(
    ("rows", "n", "k"),
    [(1, 96, 128), (1, 33, 100), (3, 40, 576), (16, 8, 33), (17, 96, 128), (33, 33, 100), (70, 40, 576)],
)
@pytest.mark.parametrize("wide", [False, True])
def test_int8_linear_loses_no_more_than_rounding_the_weights(
    kernels: Kernels, dtype: torch.dtype, rows: int, n: int, k: int, wide: bool
) -> None:
    weight, rounded = near_int8(n, k, dtype)
    bias, x = torch.randn(n).to(dtype), torch.randn(rows, k).to(dtype)
    got = kernels.pack_linear_int8(weight, bias, torch.float32 if wide else None)(x)
    assert got.dtype is (torch.float32 if wide else dtype)
    # activations may be cut to 15 bits of their row's largest value
    torch.testing.assert_close(got.double(), x.double() @ rounded.T + bias.double(), rtol=8e-3, atol=1e-2)


@pytest.mark.parametrize(
    ("rows", "intermediate", "k"),
    [
        (1, 64, 64),
        (1, 50, 34),
        (2, 96, 160),
        (12, 50, 34),
        (17, 64, 64),
        (33, 96, 160),
        (70, 50, 34),
        (300, 64, 64),
    ],
)
@pytest.mark.parametrize("int8", [False, True])
def test_gate_up_is_the_linear_layer_and_its_activation(
    kernels: Kernels, dtype: torch.dtype, rows: int, intermediate: int, k: int, int8: bool
) -> None:
    weight, rounded = near_int8(2 * intermediate, k, dtype)
    bias, x = torch.randn(2 * intermediate).to(dtype), (torch.randn(rows, k) / k**0.5).to(dtype)
    got = kernels.pack_gate_up(weight, bias, int8=int8)(x)
    assert got.dtype is dtype
    assert got.is_contiguous()
    gate, up = (x.double() @ (rounded if int8 else weight.double()).T + bias.double()).chunk(2, dim=1)
    # with int8 weights activations may be cut to 15 bits of their row's largest value
    bound = {torch.bfloat16: 2e-2, torch.float16: 1e-2 if int8 else 3e-3, torch.float32: 1e-2 if int8 else 1e-5}[
        dtype
    ]
    torch.testing.assert_close(got.double(), gate * gate.sigmoid() * up, rtol=bound, atol=bound)


@pytest.mark.parametrize("width", [8, 64, 80, 576, 1001])
def test_rms_norm_of_rows(kernels: Kernels, dtype: torch.dtype, width: int) -> None:
    x, weight = 3 * torch.randn(5, width).to(dtype), torch.randn(width).to(dtype)
    assert_near(kernels.rms_norm(x, weight, 1e-5), exact_rms_norm(x, weight, 1e-5))


def test_rms_norm_of_strided_heads(kernels: Kernels, dtype: torch.dtype) -> None:
    qkv, weight = torch.randn(7, 9 * 64).to(dtype), torch.randn(64).to(dtype)
    for x in (qkv[:, 64:256].unflatten(1, (3, 64)), qkv[:, 64:128], qkv.unflatten(1, (9, 64))[:, ::2]):
        assert_near(kernels.rms_norm(x, weight, 1e-6), exact_rms_norm(x, weight, 1e-6))


def test_rms_norm_of_large_values_does_not_overflow(kernels: Kernels, dtype: torch.dtype) -> None:
    large = 1e4 if dtype is torch.float16 else 1e15
    x, weight = (large * torch.randn(3, 64)).to(dtype), torch.ones(64, dtype=dtype)
    assert_near(kernels.rms_norm(x, weight, 1e-5), exact_rms_norm(x, weight, 1e-5))


@pytest.mark.parametrize("rows", [1, 6, 130])
def test_add_rms_norm_adds_in_place_and_norms_the_sum(kernels: Kernels, dtype: torch.dtype, rows: int) -> None:
    x, residual, weight = (torch.randn(*shape).to(dtype) for shape in ((rows, 576), (rows, 576), (576,)))
    total = (x.double() + residual.double()).to(dtype)
    got = kernels.add_rms_norm(x, residual, weight, 1e-5)
    if kernels.name == "triton" and dtype is torch.bfloat16 and not torch.cuda.is_available():
        assert_near(residual, total.double())  # its interpreter cuts off what does not fit, and does not round
    else:
        assert_same_bits(residual, total)
    assert_near(got, exact_rms_norm(residual, weight, 1e-5))


@pytest.mark.parametrize(("rows", "width"), [(1, 16), (3, 77), (5, 1536), (200, 512)])
def test_silu_mul(kernels: Kernels, dtype: torch.dtype, rows: int, width: int) -> None:
    gate_up = (4 * torch.randn(rows, 2 * width)).to(dtype)
    gate, up = gate_up.double().chunk(2, dim=1)
    assert_near(kernels.silu_mul(gate_up), gate * gate.sigmoid() * up, terms=16)


def test_silu_mul_of_extreme_gates_is_finite(kernels: Kernels, dtype: torch.dtype) -> None:
    gate_up = torch.tensor([[-1e4, -90.0, 0.0, 90.0, 1e4] * 8, [1.0] * 40], dtype=dtype).reshape(1, 80)
    gate, up = gate_up.double().chunk(2, dim=1)
    assert_near(kernels.silu_mul(gate_up), gate * gate.sigmoid() * up)


@pytest.mark.parametrize("head_dim", [64, 80, 128])
@pytest.mark.parametrize("block_tokens", [16, 32])
def test_rope_kv_write_rotates_and_writes_the_slots_alone(
    kernels: Kernels, dtype: torch.dtype, head_dim: int, block_tokens: int
) -> None:
    case = paged_case(
        [(1, 40), (1, 1), (19, 70), (2, 2)], head_dim=head_dim, block_tokens=block_tokens, dtype=dtype
    )
    angles = torch.rand(128, head_dim // 2) * 6
    cos_sin = torch.cat((angles.cos(), angles.sin()), dim=1)
    q, k = (exact_rope(x, cos_sin, case.batch.positions) for x in (case.q, case.k))
    expected = case.kv.clone()
    kernels.rope_kv_write(case.q, case.k, case.v, cos_sin, case.kv, LAYER, case.batch)
    assert_near(case.q, q)
    assert_near(case.k, k)
    blocks, offsets = case.batch.slots // block_tokens, case.batch.slots % block_tokens
    expected[blocks, :, LAYER, 0, offsets] = case.k
    expected[blocks, :, LAYER, 1, offsets] = case.v
    assert_same_bits(case.kv, expected)


def check_attention(kernels: Kernels, case: PagedCase) -> None:
    before = case.kv.clone()
    got = kernels.paged_attention(case.q, case.kv, LAYER, case.batch, case.scale)
    assert got.is_contiguous()
    assert_near(got, exact_attention(case), terms=4)
    assert_same_bits(case.kv, before)


@pytest.mark.parametrize(("group", "head_dim"), [(1, 80), (3, 64), (4, 128), (8, 64), (1, 256), (8, 80)])
def test_attention_of_a_mixed_batch(kernels: Kernels, dtype: torch.dtype, head_dim: int, group: int) -> None:
    sequences = [(1, 1), (1, 17), (1, 200), (2, 2), (5, 90), (40, 40)]
    check_attention(kernels, paged_case(sequences, group=group, head_dim=head_dim, dtype=dtype))


@pytest.mark.parametrize(
    ("context", "block_tokens"),
    [(1, 16), (15, 16), (16, 16), (31, 32), (33, 32), (64, 16), (65, 32), (511, 16), (513, 32), (2000, 16)],
)
def test_attention_of_one_decode(kernels: Kernels, dtype: torch.dtype, context: int, block_tokens: int) -> None:
    check_attention(kernels, paged_case([(1, context)], block_tokens=block_tokens, dtype=dtype))


@pytest.mark.parametrize(
    ("rows", "context", "block_tokens"),
    [(2, 2, 16), (16, 16, 16), (16, 16, 32), (43, 43, 32), (130, 130, 16), (33, 600, 16), (7, 1200, 32)],
)
def test_attention_of_one_chunk(
    kernels: Kernels, dtype: torch.dtype, rows: int, context: int, block_tokens: int
) -> None:
    check_attention(kernels, paged_case([(rows, context)], block_tokens=block_tokens, dtype=dtype))


def test_attention_of_many_sequences(kernels: Kernels, dtype: torch.dtype) -> None:
    decodes = 15 if kernels.name == "triton" else 60  # its interpreter takes long
    sequences = [(1, 1 + 37 * i % 300) for i in range(decodes)] + [(3 + i, 20 + i) for i in range(4)]
    check_attention(kernels, paged_case(sequences, kv_heads=1, dtype=dtype))


def test_attention_with_scores_far_apart_does_not_overflow(kernels: Kernels, dtype: torch.dtype) -> None:
    case = paged_case([(1, 100), (30, 100)], dtype=dtype)
    case.q.mul_(60)
    got = kernels.paged_attention(case.q, case.kv, LAYER, case.batch, case.scale)
    torch.testing.assert_close(got.double(), exact_attention(case), rtol=2e-2, atol=3e-2)


def test_attention_by_columns_of_wider_tables(kernels: Kernels, dtype: torch.dtype) -> None:
    case = paged_case([(1, 1), (1, 200), (3, 90)], dtype=dtype, wider=5)
    assert not case.batch.block_tables.is_contiguous()
    check_attention(kernels, case)


MIXED = [(1, 1), (1, 40), (1, 200), (2, 90), (35, 120)]


@pytest.mark.parametrize(("window", "soft_cap"), [(1, None), (33, None), (None, 2.0), (70, 0.5)])
def test_attention_within_a_window_and_under_a_cap(
    kernels: Kernels, dtype: torch.dtype, window: int | None, soft_cap: float | None
) -> None:
    case = paged_case(MIXED, dtype=dtype)
    got = kernels.paged_attention(case.q, case.kv, LAYER, case.batch, case.scale, window=window, soft_cap=soft_cap)
    assert_near(got, exact_attention(case, window, soft_cap), terms=4)


@pytest.mark.parametrize(("group", "head_dim"), [(3, 64), (4, 80)])
def test_attention_over_a_float8_pool(kernels: Kernels, dtype: torch.dtype, group: int, head_dim: int) -> None:
    case = paged_case(MIXED, group=group, head_dim=head_dim, dtype=dtype, kv_dtype=torch.float8_e4m3fn)
    scales = KvScales(0.5, 3.0)
    got = kernels.paged_attention(case.q, case.kv, LAYER, case.batch, case.scale, kv_scales=scales)
    assert_near(got, exact_attention(case, kv_scales=scales), terms=16)


def test_rope_kv_write_fills_a_float8_pool(kernels: Kernels, dtype: torch.dtype) -> None:
    case = paged_case([(1, 40), (19, 70)], dtype=dtype, kv_dtype=torch.float8_e4m3fn)
    expected, scales = case.kv.clone().view(torch.uint8), KvScales(0.25, 8.0)
    cos_sin = torch.cat((torch.ones(128, 32), torch.zeros(128, 32)), dim=1)
    blocks, offsets = case.batch.slots // 16, case.batch.slots % 16
    for i, (x, scale) in enumerate(((case.k, scales.k), (case.v, scales.v))):
        # values that need no rounding: in Triton's interpreter it loses the carry
        rounded = (torch.randn(x.shape).sign() * (1 + 4 * torch.rand(x.shape))).to(torch.float8_e4m3fn)
        rounded[:, 0, 3] = -448.0
        x.copy_(rounded.float() * scale)
        x[:, 0, 3] *= 10  # more than the type holds
        expected[blocks, :, LAYER, i, offsets] = rounded.view(torch.uint8)
    kernels.rope_kv_write(case.q, case.k, case.v, cos_sin, case.kv, LAYER, case.batch, scales)
    assert torch.equal(case.kv.view(torch.uint8), expected)


@pytest.mark.parametrize("turn", range(3))
def test_attention_of_any_batch(kernels: Kernels, dtype: torch.dtype, turn: int) -> None:
    draw = random.Random(torch.initial_seed() + turn)
    rows = sorted(draw.choice([1, 1, 1, 2, 9, 50]) for _ in range(draw.randint(1, 8)))
    sequences = [(n, n + draw.randint(0, 150)) for n in rows]
    group, head_dim = draw.choice([1, 2, 3, 5, 16]), draw.choice([32, 64, 96, 112])
    check_attention(kernels, paged_case(sequences, group=group, head_dim=head_dim, dtype=dtype))


SAMPLINGS = [  # temperature, top_k, top_p, min_p
    (0.0, 0, 1.0, 0.0),
    (1.0, 0, 1.0, 0.0),
    (0.7, 5, 1.0, 0.0),
    (1.5, 1, 1.0, 0.0),
    (1.0, 0, 0.8, 0.0),
    (1.2, 0, 1.0, 0.1),
    (0.9, 40, 0.9, 0.02),
    (1.0, 2**31 - 1, 0.01, 0.0),
]


def exact_sample(logits: Tensor, sampling: tuple[float, int, float, float], uniform: float) -> set[int]:
    """The tokens that the rule gives for ``logits [V]``, and for a number that is a rounding error away."""
    temperature, top_k, top_p, min_p = sampling
    if temperature == 0:
        return {int(logits.argmax())}
    scaled = logits.double() / temperature
    values = scaled.sort(descending=True).values
    kept = values[values >= values[0] + (torch.tensor(min_p).log() if min_p else -torch.inf)]
    kept = kept[kept >= values[min(top_k, len(values)) - 1]] if top_k else kept
    if top_p < 1:
        mass = kept.softmax(0).cumsum(0)
        kept = kept[: int((mass < top_p).sum()) + 1]
    cumulative = scaled.masked_fill(scaled < kept[-1], -torch.inf).softmax(0).cumsum(0)
    points = [uniform, max(0.0, uniform - 1e-5), min(1.0, uniform + 1e-5)]
    return {int(torch.searchsorted(cumulative, point, right=True).clamp(max=len(scaled) - 1)) for point in points}


@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (5, 320), (16, 5001)])
def test_argmax_is_the_first_of_the_largest(kernels: Kernels, shape: tuple[int, int]) -> None:
    logits = torch.randn(shape).round(decimals=1)  # many are equal
    tokens = kernels.argmax(logits)
    assert tokens.dtype is torch.int64
    for row, token in zip(logits.tolist(), tokens.tolist(), strict=True):
        assert token == row.index(max(row))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_argmax_finds_what_is_not_finite(kernels: Kernels, bad: float) -> None:
    logits = torch.randn(4, 133)
    logits[1, 70] = bad
    logits[2] = bad
    logits[3, 132] = bad
    tokens = kernels.argmax(logits)
    assert torch.isfinite(logits[0, tokens[0]])
    assert not torch.isfinite(logits[2, tokens[2]])
    if bad != -torch.inf:
        assert (int(tokens[1]), int(tokens[3])) == (70, 132)


@pytest.mark.parametrize("vocab", [7, 320, 5000])
def test_sample_draws_as_the_filters_say(kernels: Kernels, vocab: int) -> None:
    rows = [sampling for sampling in SAMPLINGS for _ in range(3)]
    temperature, top_k, top_p, min_p = zip(*rows, strict=True)
    logits, uniform = 3 * torch.randn(len(rows), vocab), torch.rand(len(rows), dtype=torch.float64)
    params = SampleParams(
        torch.tensor(temperature),
        torch.tensor(top_k, dtype=torch.int32),
        torch.tensor(top_p),
        torch.tensor(min_p),
        uniform,
    )
    tokens = kernels.sample(logits, params)
    assert tokens.dtype is torch.int64
    for row, token in enumerate(tokens.tolist()):
        assert token in exact_sample(logits[row], rows[row], float(uniform[row])), rows[row]


def test_sample_of_a_row_that_is_not_finite_is_some_token(kernels: Kernels) -> None:
    logits = torch.full((2, 64), torch.nan)
    ones, whole = torch.ones(2), torch.zeros(2, dtype=torch.int32)
    params = SampleParams(torch.tensor([0.0, 1.0]), whole, ones, 0 * ones, torch.rand(2, dtype=torch.float64))
    assert all(0 <= token < 64 for token in kernels.sample(logits, params).tolist())
