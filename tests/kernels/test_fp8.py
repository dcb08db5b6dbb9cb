from __future__ import annotations

import pytest
import torch

from kernels.fp8 import LARGEST, pack_linear_fp8, quantize_channels

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def test_rounding_keeps_each_row_within_its_scale() -> None:
    x = torch.randn(7, 96) * torch.logspace(-6, 6, 7).unsqueeze(1)
    rounded, scales = quantize_channels(x)
    assert rounded.dtype is torch.float8_e4m3fn and scales.shape == (7,)
    back = rounded.float() * scales.unsqueeze(1)
    step = torch.maximum(x.abs() / 16, scales.unsqueeze(1) * 2**-9)  # 3 bits behind the point, halved
    assert bool(((back - x).abs() <= step * 1.01).all())
    assert float(rounded.float().abs().max()) <= LARGEST


def test_rows_of_zeros_stay_zeros() -> None:
    rounded, scales = quantize_channels(torch.zeros(2, 32))
    assert not rounded.float().any() and bool((scales > 0).all())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("rows", [1, 17, 64])
@pytest.mark.parametrize("with_bias", [False, True])
def test_linear_multiplies_the_rounded_operands(device: str, rows: int, with_bias: bool) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU")
    n, k = 96, 160
    x, exact = torch.randn(rows, k).bfloat16(), torch.randn(n, k)
    weight, scales = quantize_channels(exact)
    bias = torch.randn(n).bfloat16() if with_bias else None
    arguments = [t if t is None else t.to(device) for t in (weight, scales, bias)]
    got = pack_linear_fp8(*arguments, torch.bfloat16)(x.to(device)).cpu()  # type: ignore[arg-type]
    rounded, row_scales = quantize_channels(x)
    expected = (rounded.double() * row_scales.unsqueeze(1)) @ (weight.double() * scales.unsqueeze(1)).T
    expected = expected if bias is None else expected + bias.double()
    assert got.dtype is torch.bfloat16
    error = (got.double() - expected).norm() / expected.norm()
    assert error < 1e-2, error
