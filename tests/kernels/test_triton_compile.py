"""The Triton kernels compile to machine code, which the interpreter does not show, and fit the device."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from tests.kernels.absent_gpu import SHARED_BYTES


@pytest.mark.parametrize("arch", [80, 90])
def test_every_kernel_compiles_and_fits(arch: int) -> None:
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.absent_gpu", str(arch)],
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
        env=env,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    launched = [json.loads(line) for line in done.stdout.splitlines()]
    assert {launch["kernel"].strip("_").removesuffix("_kernel") for launch in launched} == {
        "decode", "combine", "prefill", "rope", "rms_norm", "add_rms_norm", "silu_mul", "sample",
        "move", "checksum",
    }  # fmt: skip
    assert max(launch["shared"] for launch in launched) <= SHARED_BYTES[arch]
