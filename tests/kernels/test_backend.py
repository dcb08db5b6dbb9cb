"""The native backend beyond the contract: int8 weights, rows that do not depend on their company, threads."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from kernels.cpu.backend import CpuKernels
from kernels.cpu.build import BuildError, runnable_isas
from kernels.cpu.linear import NativeLinear
from kernels.reference import TorchLinear
from tests.kernels.cases import LAYER, exact_attention, paged_case


@pytest.fixture(scope="module", params=runnable_isas())
def kernels(request: pytest.FixtureRequest) -> CpuKernels:
    try:
        return CpuKernels(isa=request.param, threads=1)
    except BuildError as error:
        pytest.skip(str(error))


def test_int8_activations_keep_an_outlier_and_its_row(kernels: CpuKernels) -> None:
    weight, x = torch.randn(96, 128), torch.randn(7, 128)
    x[:, 3] *= 50  # as models have them
    scale = weight.abs().amax(1, keepdim=True) / 127
    exact = x.double() @ ((weight / scale).round().double() * scale.double()).T
    torch.testing.assert_close(kernels.pack_linear_int8(weight, None)(x).double(), exact, rtol=8e-3, atol=0.1)


def test_int8_linear_of_zero_rows_and_zero_weights_is_zero(kernels: CpuKernels) -> None:
    linear = kernels.pack_linear_int8(torch.zeros(64, 64), None)
    assert torch.equal(linear(torch.randn(3, 64)), torch.zeros(3, 64))
    linear = kernels.pack_linear_int8(torch.randn(64, 64), None)
    assert torch.equal(linear(torch.zeros(3, 64)), torch.zeros(3, 64))


def test_float32_rows_do_not_depend_on_their_company(kernels: CpuKernels) -> None:
    linear, x = kernels.pack_linear(torch.randn(96, 200), None), torch.randn(70, 200)
    together = linear(x)
    for rows in (slice(0, 1), slice(5, 8), slice(13, 26), slice(60, 70)):
        assert torch.equal(linear(x[rows]), together[rows])


def test_decode_does_not_depend_on_company_or_threads(kernels: CpuKernels) -> None:
    sequences = [(1, 700), (1, 30), (1, 1300)]
    case = paged_case(sequences, dtype=torch.float32)
    alone = kernels.paged_attention(case.q, case.kv, LAYER, case.batch, case.scale)
    crowd = CpuKernels(isa=kernels.isa, threads=3)
    assert torch.equal(crowd.paged_attention(case.q, case.kv, LAYER, case.batch, case.scale), alone)
    crowd.close()


def test_a_new_batch_on_the_same_pool_is_noticed(kernels: CpuKernels) -> None:
    for more in range(3):
        case = paged_case([(1, 20 + more), (4, 9)])
        got = kernels.paged_attention(case.q, case.kv, LAYER, case.batch, case.scale)
        torch.testing.assert_close(got.double(), exact_attention(case), rtol=1e-5, atol=1e-5)


def test_shapes_that_are_not_covered_go_to_the_reference(kernels: CpuKernels) -> None:
    case = paged_case([(1, 20), (4, 9)], head_dim=24)
    got = kernels.paged_attention(case.q, case.kv, LAYER, case.batch, case.scale)
    torch.testing.assert_close(got.double(), exact_attention(case), rtol=1e-5, atol=1e-5)
    assert isinstance(kernels.pack_linear(torch.randn(8, 7), None), TorchLinear)
    assert isinstance(kernels.pack_linear(torch.randn(8, 8).half(), None), TorchLinear)
    assert isinstance(kernels.pack_linear(torch.randn(8, 8), None), NativeLinear)


def test_rows_of_the_wrong_width_are_refused(kernels: CpuKernels) -> None:
    with pytest.raises(ValueError, match="rows of 6 values, the weight takes 8"):
        kernels.pack_linear(torch.randn(4, 8), None)(torch.randn(2, 6))


def test_two_callers_at_once_get_their_own_results() -> None:
    kernels = CpuKernels(threads=2)
    linear, inputs = kernels.pack_linear(torch.randn(2048, 256), None), [torch.randn(8, 256) for _ in range(4)]
    expected = [linear(x) for x in inputs]

    def call(i: int) -> bool:
        return all(torch.equal(linear(inputs[i]), expected[i]) for _ in range(100))

    with ThreadPoolExecutor(4) as callers:
        assert all(callers.map(call, range(4), timeout=60))
    kernels.close()


def test_idle_threads_use_no_cpu_and_end_with_the_process() -> None:
    script = (
        "import time, torch\n"
        "from kernels.cpu.backend import CpuKernels\n"
        "k = CpuKernels(threads=4)\n"
        "k.pack_linear(torch.randn(2048, 256), None)(torch.randn(4, 256))\n"
        "before = time.process_time(); time.sleep(0.5); print(time.process_time() - before)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert float(done.stdout) < 0.05
