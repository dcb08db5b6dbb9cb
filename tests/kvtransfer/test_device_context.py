"""UCX works in the CUDA context of the thread that drives it, which is not the thread that made the engine."""

from __future__ import annotations

import ctypes
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from engine.device_pool import TensorPool

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]


def current_context() -> int | None:
    """Of the calling thread."""
    context = ctypes.c_void_p()
    assert ctypes.CDLL("libcuda.so.1").cuCtxGetCurrent(ctypes.byref(context)) == 0
    return context.value


@pytest.mark.parametrize("index", range(max(1, torch.cuda.device_count())))
def test_the_thread_that_makes_the_pool_has_a_context(index: int) -> None:
    kv = torch.zeros(4, 1024, device=f"cuda:{index}")
    graph_streams = torch.cuda.Stream(kv.device, priority=-1)  # type: ignore[no-untyped-call]  # made once, elsewhere
    with ThreadPoolExecutor(1) as thread:
        assert thread.submit(current_context).result() is None
        pool = thread.submit(TensorPool, kv).result()
        assert thread.submit(current_context).result() is not None
        assert thread.submit(torch.cuda.current_device).result() == index
    assert pool.num_blocks == 4 and graph_streams is not None
