"""Copies and checksums of a pool by block, as transfers ask for them."""

from __future__ import annotations

import pytest
import torch
import triton

from engine.device_pool import TensorPool, expandable
from kernels import pool_shape
from kvtransfer.checksums import checksum_words

pytestmark = pytest.mark.skipif(not triton.knobs.runtime.interpret, reason="Triton compiles here")


@pytest.fixture
def kv() -> torch.Tensor:
    return torch.randn(pool_shape(9, 2, 3, 16, 8)).bfloat16()


def test_reads_and_writes_are_the_bytes_of_the_pool(kv: torch.Tensor) -> None:
    pool, raw = TensorPool(kv), kv.view(-1).view(torch.uint8)
    buffers = [pool.host_buffer(100) for _ in range(2)]
    pool.read([7000, 2], buffers)
    assert [bytes(b) for b in buffers] == [raw[i : i + 100].numpy().tobytes() for i in (7000, 2)]
    expected = raw.clone()
    expected[16:116], expected[8000:8100] = raw[7000:7100], raw[2:102]
    pool.write([16, 8000], buffers)
    assert torch.equal(raw, expected)


def test_checksums_are_those_of_the_host(kv: torch.Tensor) -> None:
    pool, raw = TensorPool(kv), kv.view(9, -1).view(torch.uint8)
    expected = [checksum_words(raw[i, 32:1032].numpy().data) for i in (8, 1, 3)]
    assert pool.checksums([8, 1, 3], 32, 1000) == expected


def test_runs_of_blocks_are_gathered_and_scattered(kv: torch.Tensor) -> None:
    pool, other = TensorPool(kv), TensorPool(torch.zeros_like(kv))
    size = pool.block_bytes
    buffers = [pool.device_buffer(3 * size)[1] for _ in range(2)]
    assert pool.device_buffer(size)[0] != pool.address()
    pool.gather([[7, 0], [3]], buffers)
    other.scatter([[2, 8], [1]], buffers)
    found = [memoryview(bytearray(size)) for _ in range(9)]
    other.read([i * size for i in range(9)], found)
    wanted = {2: 7, 8: 0, 1: 3}
    for i, block in enumerate(found):
        expected = kv[wanted[i]].view(torch.uint8).numpy().tobytes() if i in wanted else bytes(size)
        assert bytes(block) == expected


def test_its_address_and_size_are_those_of_the_tensor(kv: torch.Tensor) -> None:
    pool = TensorPool(kv)
    assert pool.address() == kv.data_ptr()
    assert (pool.num_blocks, pool.block_bytes) == (9, kv[0].numel() * 2)


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, False),
        ({"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64, expandable_segments:True"}, True),
        ({"PYTORCH_ALLOC_CONF": "expandable_segments:True"}, True),
        ({"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:False"}, False),
        ({"PYTORCH_CUDA_ALLOC_CONF": "backend:native"}, False),
    ],
)
def test_expandable_segments_are_recognised(environment: dict[str, str], expected: bool) -> None:
    assert expandable(environment) is expected
