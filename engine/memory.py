"""How many KV blocks fit: from what was asked for, or from what is free. Arithmetic only.

Invariant: at least two blocks, or a ConfigError that says what to change.
"""

from __future__ import annotations

from splitserve.errors import ConfigError
from splitserve.layout import KVLayout

HOST_SHARE = 0.2  # of the free host memory, when no size is given
# Assumed, not measured: what the driver says is in use counts the other processes on the GPU too.
OUTSIDE_BYTES = 640 << 20  # of a GPU process outside torch's tensors: CUDA context, libraries, captured graphs


def blocks_in(num_bytes: int, layout: KVLayout) -> int:
    """For an explicit size."""
    num_blocks = num_bytes // layout.block_bytes
    if num_blocks < 2:
        raise ConfigError(
            f"kv-cache-memory of {num_bytes} bytes holds fewer than two blocks of {layout.block_bytes} bytes"
        )
    return num_blocks


def host_blocks(available: int, useful: int, layout: KVLayout) -> int:
    """For a pool in host memory: a share of what is free, and no more than is of use."""
    return blocks_in(min(useful, int(available * HOST_SHARE)), layout)


def gpu_blocks(total: int, utilization: float, peak: int, layout: KVLayout) -> int:
    """For a pool in GPU memory. ``peak``: bytes of weights and of the largest step, measured in this process, so
    that other workers on the same GPU, which start at the same time, don't disturb the figure."""
    left = int(total * utilization) - peak - OUTSIDE_BYTES
    if left < 2 * layout.block_bytes:
        raise ConfigError(
            f"too little GPU memory: weights and one step take {_gib(peak + OUTSIDE_BYTES)} of the "
            f"{_gib(int(total * utilization))} that --gpu-memory-utilization {utilization:g} gives, and "
            "nothing is left for the KV pool; raise it, lower --max-num-batched-tokens, or use --quantization fp8"
        )
    return left // layout.block_bytes


def check_free(free: int, total: int, utilization: float) -> None:
    """ConfigError if others hold what this worker may take."""
    wanted = int(total * utilization)
    if free < wanted:
        raise ConfigError(
            f"--gpu-memory-utilization {utilization:g} asks for {_gib(wanted)} of GPU memory, {_gib(free)} of "
            f"{_gib(total)} are free; at most {free / total:.2f} fits beside the other processes"
        )


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.1f} GiB"
