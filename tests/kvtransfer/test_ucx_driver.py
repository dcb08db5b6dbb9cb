"""What UCX says that it can use, and whether device memory may be handed to it."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kvtransfer import available_transports
from kvtransfer.ucx_driver import _ENVIRONMENT, UcxDriver, carries_device_memory, device_way, resources_of

COMPONENTS = """#
# UCP context
#
#     component 0  :  self
#     component 1  :  cuda_cpy
#
#            md 0  :  component 0  self
#
#      resource 0  :  md 0  dev 0  flags -- self/memory
#      resource 1  :  md 1  dev 1  flags -- tcp/eth0
#      resource 2  :  md 1  dev 1  flags -s tcp/eth0
"""
COPIES = "#      resource 3  :  md 2  dev 2  flags -- cuda_copy/cuda\n"
IPC = "#      resource 10 :  md 3  dev 2  flags -- cuda_ipc/cuda\n"

needs_ucx = pytest.mark.skipif("ucx" not in available_transports(), reason="ucxx is not installed")


def test_resources_are_named_once() -> None:
    assert resources_of(COMPONENTS + IPC) == ["self/memory", "tcp/eth0", "cuda_ipc/cuda"]


@pytest.mark.parametrize(
    ("info", "carries", "way"),
    [
        ("", False, "not known"),
        (COMPONENTS, False, "not known"),  # a component without a device
        (COMPONENTS + IPC, False, "not known"),  # cuda_ipc alone can't tell what memory an address is in
        (COMPONENTS + COPIES, True, "without cuda_ipc"),
        (COMPONENTS + COPIES + IPC, True, "by cuda_ipc"),
    ],
)
def test_device_memory_needs_a_resource_that_copies_it(info: str, carries: bool, way: str) -> None:
    resources = resources_of(info)
    assert carries_device_memory(resources) is carries
    assert way in device_way(resources)


@needs_ucx
@pytest.mark.skipif(Path("/dev/nvidiactl").exists(), reason="UCX may find a GPU here")
async def test_ucx_without_a_gpu_takes_no_device_memory_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "kvtransfer.ucx_driver"):
        driver = UcxDriver()
    try:
        assert driver.carries_device_memory is False
        assert "tcp/" in driver.lanes and "cuda" not in driver.lanes
        [line] = caplog.messages
        assert "can use self/memory" in line and "device memory is not known" in line
    finally:
        driver.close()


@needs_ucx
def test_every_setting_is_one_that_ucx_knows() -> None:
    code = "import asyncio, kvtransfer.ucx_driver as d\nasync def main(): d.UcxDriver()\nasyncio.run(main())"
    environment = {**os.environ, "UCX_WARN_UNUSED_ENV_VARS": "y", "UCX_LOG_LEVEL": "warn", "UCX_NO_SUCH": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert "UCX_NO_SUCH" in done.stdout  # it tells
    assert not [name for name in _ENVIRONMENT if name in done.stdout and name != "UCX_WARN_UNUSED_ENV_VARS"]
