"""Compiles to machine code what the Triton backend launches, for a GPU that is not there.

``python -m tests.kernels.absent_gpu 90 kernels [BYTES]`` prints one line of JSON for each launch, for compute
capability 9.0 and so much shared memory; WORKS has what else can be launched. Run without TRITON_INTERPRET. The
stand-in below answers Triton's questions to a driver and launches nothing.
"""

from __future__ import annotations

import json
import sys
from itertools import product
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from kernels import AttentionShape, SampleParams
from kernels.triton import rows, transfer
from kernels.triton.backend import TritonKernels
from kernels.triton.tuning import Device, Tuning
from tests.kernels.cases import LAYER, PagedCase, paged_case

SHARED_BYTES = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10}
FP8 = torch.float8_e4m3fn


class AbsentGpu:
    """Triton's driver as far as a compilation and a launch that does nothing need it."""

    def __init__(self, arch: int, shared_bytes: int) -> None:
        self.arch, self.shared_bytes, self.utils = arch, shared_bytes, self
        self.launched: list[Any] = []

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": self.shared_bytes}

    def load_binary(self, *kernel: Any) -> tuple[int, int, int, int, int]:
        return 1, 1, 0, 0, 1024

    def unload_module(self, module: int) -> None:
        pass

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        return lambda *arguments: self.launched.append(metadata)


def every_kernel(kernels: TritonKernels, fp8: bool) -> None:
    for dtype, head_dim, group in ((torch.bfloat16, 128, 4), (torch.float16, 64, 3)):
        _layer(kernels, paged_case([(1, 30), (1, 40), (20, 50)], head_dim=head_dim, group=group, dtype=dtype))
    case = paged_case(
        [(1, 30), (20, 50)], head_dim=128, group=4, dtype=torch.bfloat16, kv_dtype=FP8 if fp8 else None
    )
    _layer(kernels, case, window=32, soft_cap=20.0)
    x = torch.ones(64, 4096, dtype=torch.bfloat16)
    kernels.rms_norm(x, x[0], 1e-5)
    kernels.add_rms_norm(x, x.clone(), x[0], 1e-5)
    kernels.silu_mul(x)
    if fp8:
        rows.quantize_rows(x)
    row = torch.ones(4)
    params = SampleParams(row, row.int(), row, row, row.double())
    kernels.sample(torch.ones(4, 128_256), params)
    pool, blocks = torch.zeros(8, 65_536, dtype=torch.int32), torch.arange(3)
    transfer.gather(pool, blocks, 0, torch.zeros(3, 65_536, dtype=torch.int32))
    transfer.scatter(pool, blocks, 0, torch.zeros(3, 65_536, dtype=torch.int32))
    transfer.checksums(pool, blocks, 0, 65_536)


def mixed_steps(kernels: TritonKernels, fp8: bool) -> None:
    """Decodes and chunks in any numbers, tables of any width."""
    for decodes, chunks, longest in ((1, 1, 5), (2, 1, 40), (3, 2, 250), (5, 4, 90), (40, 1, 300), (4, 7, 20)):
        case = paged_case([*[(1, 3)] * decodes, *[(2, longest)] * chunks], dtype=torch.bfloat16)
        kernels.paged_attention(case.q, case.kv, LAYER, case.batch, case.scale)


def any_shape(kernels: TritonKernels, fp8: bool) -> None:
    """Attention over all that a model may ask for; each shape's options in turn."""
    options: list[dict[str, Any]] = [{}, {"window": 64}, {"soft_cap": 20.0}, {"window": 64, "soft_cap": 20.0}]
    shapes = product((torch.bfloat16, torch.float16, torch.float32), (64, 80, 96, 128, 256), (1, 16), (16, 32))
    for i, (dtype, head_dim, group, block_tokens) in enumerate(shapes):
        for kv_dtype in (None, FP8) if fp8 else (None,):
            case = paged_case(
                [(1, 30), (20, 50)], kv_heads=1, group=group, head_dim=head_dim, block_tokens=block_tokens,
                dtype=dtype, kv_dtype=kv_dtype,
            )  # fmt: skip
            _layer(kernels, case, **options[i % len(options)])


def a_model(kernels: TritonKernels, fp8: bool) -> None:
    """What an engine asks for at its start; prints why not."""
    try:
        kernels.check(AttentionShape(32, 8, 128, 16, torch.bfloat16, torch.bfloat16))
    except ValueError as error:
        print(json.dumps({"refused": str(error)}))


def _layer(kernels: TritonKernels, case: PagedCase, **options: Any) -> None:
    kernels.paged_attention(case.q, case.kv, LAYER, case.batch, case.scale, **options)
    kernels.rope_kv_write(case.q, case.k, case.v, torch.ones(64, case.q.shape[2]), case.kv, LAYER, case.batch)


WORKS = {"kernels": every_kernel, "steps": mixed_steps, "shapes": any_shape, "model": a_model}


def main(arch: int, work: str, shared_bytes: int) -> None:
    gpu = AbsentGpu(arch, shared_bytes)
    driver.set_active(gpu)
    device = Device("absent", 108, shared_bytes, divmod(arch, 10))
    WORKS[work](TritonKernels("meta", Tuning(device)), arch >= 89)
    for m in gpu.launched:
        print(json.dumps({"kernel": m.name, "shared": m.shared, "warps": m.num_warps, "code": m.hash}))


if __name__ == "__main__":
    number = int(sys.argv[1])
    main(number, sys.argv[2], int(sys.argv[3]) if len(sys.argv) > 3 else SHARED_BYTES[number])
