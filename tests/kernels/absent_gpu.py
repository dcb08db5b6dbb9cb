"""Compiles to machine code what the Triton backend launches, for a GPU that is not there.

``python -m tests.kernels.absent_gpu 90`` prints, for compute capability 9.0, one line of JSON for each launch. Run
without TRITON_INTERPRET. The stand-in below answers Triton's questions to a driver and launches nothing.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from kernels import SampleParams
from kernels.triton import transfer
from kernels.triton.backend import TritonKernels
from kernels.triton.tuning import Device, Tuning
from tests.kernels.cases import LAYER, paged_case

SHARED_BYTES = {80: 163 << 10, 89: 99 << 10, 90: 227 << 10}


class AbsentGpu:
    """Triton's driver as far as a compilation and a launch that does nothing need it."""

    def __init__(self, arch: int) -> None:
        self.arch, self.utils = arch, self
        self.launched: list[Any] = []

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": SHARED_BYTES[self.arch]}

    def load_binary(self, *kernel: Any) -> tuple[int, int, int, int, int]:
        return 1, 1, 0, 0, 1024

    def unload_module(self, module: int) -> None:
        pass

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        return lambda *arguments: self.launched.append(metadata)


def main(arch: int) -> None:
    gpu = AbsentGpu(arch)
    driver.set_active(gpu)
    device = Device("absent", 108, SHARED_BYTES[arch], divmod(arch, 10))
    kernels = TritonKernels("absent", Tuning(device))
    for dtype, head_dim, group in ((torch.bfloat16, 128, 4), (torch.float16, 64, 3)):
        case = paged_case([(1, 30), (1, 40), (20, 50)], head_dim=head_dim, group=group, dtype=dtype)
        kernels.paged_attention(case.q, case.kv, LAYER, case.batch, case.scale)
        kernels.rope_kv_write(case.q, case.k, case.v, torch.ones(64, head_dim), case.kv, LAYER, case.batch)
    case = paged_case(
        [(1, 30), (20, 50)], head_dim=128, group=4, dtype=torch.bfloat16,
        kv_dtype=torch.float8_e4m3fn if arch >= 89 else None,
    )  # fmt: skip
    kernels.paged_attention(case.q, case.kv, LAYER, case.batch, case.scale, window=32, soft_cap=20.0)
    kernels.rope_kv_write(case.q, case.k, case.v, torch.ones(64, 128), case.kv, LAYER, case.batch)
    x = torch.ones(64, 4096, dtype=torch.bfloat16)
    kernels.rms_norm(x, x[0], 1e-5)
    kernels.add_rms_norm(x, x.clone(), x[0], 1e-5)
    kernels.silu_mul(x)
    row = torch.ones(4)
    params = SampleParams(row, row.int(), row, row, row.double())
    kernels.sample(torch.ones(4, 128_256), params)
    pool, blocks = torch.zeros(8, 65_536, dtype=torch.int32), torch.arange(3)
    transfer.gather(pool, blocks, 0, torch.zeros(3, 65_536, dtype=torch.int32))
    transfer.scatter(pool, blocks, 0, torch.zeros(3, 65_536, dtype=torch.int32))
    transfer.checksums(pool, blocks, 0, 65_536)
    for metadata in gpu.launched:
        print(json.dumps({"kernel": metadata.name, "shared": metadata.shared, "warps": metadata.num_warps}))


if __name__ == "__main__":
    main(int(sys.argv[1]))
