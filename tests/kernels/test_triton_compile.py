"""The Triton kernels compile to machine code, which the interpreter does not show, and fit the device."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from tests.kernels.absent_gpu import SHARED_BYTES


def compiled(arch: int, work: str, shared_bytes: int | None = None, timeout: int = 110) -> list[dict[str, Any]]:
    """What was launched, in order."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "tests.kernels.absent_gpu",
            str(arch),
            work,
            str(shared_bytes or SHARED_BYTES[arch]),
        ],
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
        env=env,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("arch", [80, 90])
def test_every_kernel_compiles_and_fits(arch: int) -> None:
    launched = compiled(arch, "kernels")
    assert {launch["kernel"].strip("_").removesuffix("_kernel") for launch in launched} == {
        "decode", "combine", "prefill", "rope", "rms_norm", "add_rms_norm", "silu_mul", "sample",
        "move", "checksum", *(["quantize"] if arch >= 89 else []),
    }  # fmt: skip
    assert max(launch["shared"] for launch in launched) <= SHARED_BYTES[arch]
    assert launched[0]["shared"] > 64 << 10  # decode: two steps of 16 KB of K and of V are loaded ahead


def test_steps_of_other_sizes_find_their_kernels_compiled() -> None:
    launched = compiled(90, "steps")
    assert len(launched) == 18
    assert len({launch["code"] for launch in launched}) == 3


def test_a_device_with_little_memory_gets_smaller_cuts() -> None:
    launched = compiled(90, "model", 40_000)
    assert [launch["kernel"] for launch in launched] == ["_decode_kernel", "_combine_kernel", "_prefill_kernel"]
    assert max(launch["shared"] for launch in launched) <= 40_000


def test_a_device_that_no_cut_fits_is_refused_in_one_line() -> None:
    [refused] = compiled(90, "model", 3000)
    assert refused["refused"].startswith("no Triton decode attention of head size 128 in bfloat16 fits absent")
    assert "\n" not in refused["refused"]


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.skipif(
    not os.environ.get("SPLITSERVE_COMPILE_ALL"), reason="takes an hour: set SPLITSERVE_COMPILE_ALL"
)
@pytest.mark.parametrize("arch", SHARED_BYTES)
def test_attention_of_any_shape_compiles_and_fits(arch: int) -> None:
    launched = compiled(arch, "shapes", timeout=3500)
    assert max(launch["shared"] for launch in launched) <= SHARED_BYTES[arch]
