"""A model's layers in one native call: the same numbers as kernel after kernel."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from kernels import DecoderLayer, DecoderWeights
from kernels.cpu.backend import CpuKernels
from kernels.cpu.build import BuildError, runnable_isas
from kernels.cpu.decoder import NativeDecoder
from kernels.decoder import LayerByLayer
from tests.kernels.cases import paged_case

HIDDEN, INNER = 96, 160
STEPS = {"decodes": [(1, 20), (1, 700)], "mixed": [(1, 33), (7, 40), (50, 50)], "chunks": [(60, 200)]}


@pytest.fixture(scope="module", params=runnable_isas())
def kernels(request: pytest.FixtureRequest) -> CpuKernels:
    try:
        return CpuKernels(isa=request.param, threads=2)
    except BuildError as error:
        pytest.skip(str(error))


def made_up(kernels: CpuKernels, kv: Tensor, heads: int, *, norms: bool, int8: bool) -> DecoderWeights:
    _, kv_heads, layers, _, _, head_dim = kv.shape
    dtype = kv.dtype

    def weight(n: int, k: int) -> Tensor:
        return (torch.randn(n, k) * k**-0.5).to(dtype)

    def norm(width: int) -> Tensor:
        return (1 + 0.1 * torch.randn(width)).to(dtype)

    pack = kernels.pack_linear_int8 if int8 else kernels.pack_linear
    qkv = (heads + 2 * kv_heads) * head_dim
    return DecoderWeights(
        [
            DecoderLayer(
                input_norm=norm(HIDDEN),
                qkv=pack(weight(qkv, HIDDEN), torch.randn(qkv).to(dtype)),
                q_norm=norm(head_dim) if norms else None,
                k_norm=norm(head_dim) if norms else None,
                output=pack(weight(HIDDEN, heads * head_dim), None),
                mlp_norm=norm(HIDDEN),
                gate_up=kernels.pack_gate_up(weight(2 * INNER, HIDDEN), None, int8=int8),
                down=pack(weight(HIDDEN, INNER), None),
            )
            for _ in range(layers)
        ],
        last_norm=norm(HIDDEN),
        cos_sin=torch.rand(1024, head_dim),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        eps=1e-5,
        window=None,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("step", list(STEPS))
@pytest.mark.parametrize("norms, int8", [(False, False), (True, False), (False, True)])
def test_one_call_computes_what_kernel_after_kernel_does(
    kernels: CpuKernels, dtype: torch.dtype, step: str, norms: bool, int8: bool
) -> None:
    case = paged_case(STEPS[step], dtype=dtype)
    weights = made_up(kernels, case.kv, case.q.shape[1], norms=norms, int8=int8)
    decoder = kernels.decoder(weights)
    assert not isinstance(decoder, LayerByLayer)
    embedded = torch.randn(case.q.shape[0], HIDDEN).to(dtype)
    results = []
    for each in (LayerByLayer(kernels, weights), decoder):
        residual, kv = embedded.clone(), case.kv.clone()
        results.append((each(residual, kv, case.batch), residual, kv))
    for apart, together in zip(*results, strict=True):
        assert torch.equal(apart.nan_to_num(7), together.nan_to_num(7))


def test_what_one_call_does_not_cover_goes_kernel_by_kernel(
    kernels: CpuKernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = paged_case(STEPS["mixed"])
    weights = replace(made_up(kernels, case.kv, case.q.shape[1], norms=False, int8=False), window=16)
    monkeypatch.delattr(NativeDecoder, "__call__")
    embedded = torch.randn(case.q.shape[0], HIDDEN)
    got = kernels.decoder(weights)(embedded.clone(), case.kv.clone(), case.batch)
    assert torch.equal(got, LayerByLayer(kernels, weights)(embedded, case.kv, case.batch))
    odd = replace(weights.layers[0], down=kernels.pack_linear(torch.randn(HIDDEN, INNER).half(), None))
    assert isinstance(kernels.decoder(replace(weights, layers=[odd])), LayerByLayer)
