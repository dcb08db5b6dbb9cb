"""Attention kernels beside the device's copy and other libraries on the same data; their error norms."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.gpu.measure import Bench, Line, error
from kernels import AttentionBatch, AttentionShape, ReferenceKernels, pool_shape
from kernels.triton import transfer
from kernels.triton.backend import TritonKernels, shape_of
from kernels.triton.tune import measure_on_gpu, tune

BLOCK = 16


def tuning(bench: Bench) -> Iterator[Line]:
    """Searches for better cuts than the rule's."""
    model, kernels = bench.scale.model, bench.kernels
    assert isinstance(kernels, TritonKernels)
    if bench.device.type != "cuda":
        yield Line("tuned cuts", "not on a CPU")
        return
    shape = AttentionShape(
        model.num_heads, model.num_kv_heads, model.head_dim, BLOCK, bench.scale.dtype, bench.scale.dtype
    )
    measure = measure_on_gpu(kernels.tuning.device, shape)
    known = shape_of(shape)
    before = {"decode": kernels.tuning.decode(known), "prefill": kernels.tuning.prefill(known)}
    for kernel, best in tune(kernels.tuning, shape, measure, bench.scale.tuned_cuts).items():
        gain = measure(kernel, before[kernel]) / best
        cut = getattr(kernels.tuning, kernel)(known)
        yield Line(f"tuned {kernel}: {cut}", f"{best * 1e6:.0f} us", gain)


def decode_attention(bench: Bench) -> Iterator[Line]:
    model, dtype, layers = bench.scale.model, bench.scale.dtype, 2
    sequences, context = bench.scale.decode_sequences, bench.scale.decode_context
    heads, kv_heads, dim = model.num_heads, model.num_kv_heads, model.head_dim
    batch, scale = bench.paged(sequences, 1, context), dim**-0.5
    shape = pool_shape(batch.block_tables.numel(), kv_heads, layers, BLOCK, dim)
    kv = torch.randn(shape, dtype=dtype, device=bench.device)
    q = torch.randn(sequences, heads, dim, dtype=dtype, device=bench.device)
    got = bench.kernels.paged_attention(q, kv, 0, batch, scale)
    k, v = contiguous(kv, batch)
    wide_k, wide_v = (_heads(x, heads).double() for x in (k, v))
    wide = F.scaled_dot_product_attention(q.double().unsqueeze(2), wide_k, wide_v)
    del wide_k, wide_v
    wrong = error(got, wide.flatten(1))

    def ours(pool: Tensor = kv) -> None:
        for layer in range(layers):  # together more than the cache holds
            bench.kernels.paged_attention(q, pool, layer, batch, scale)

    yield Line("decode attention, error to float64", f"{wrong:.1e}", wrong, 1e-2, most=True)
    taken = bench.seconds(ours) / layers
    num_bytes = 2 * sequences * context * kv_heads * dim * kv.element_size()
    yield Line("decode attention / copy", f"{taken * 1e6:.0f} us", num_bytes / taken / bench.copy_rate, 0.85)
    gathered = bench.seconds(lambda: F.scaled_dot_product_attention(q.unsqueeze(2), k, v, enable_gqa=True))
    yield Line("the same / torch SDPA, gathered KV", f"{gathered * 1e6:.0f} us", gathered / taken, 2.0)
    yield _flashinfer(bench, q, k, v, taken)
    small = kv.float().to(torch.float8_e4m3fn)
    eight = bench.seconds(lambda: ours(small)) / layers
    rate = num_bytes // kv.element_size() / eight / bench.copy_rate
    yield Line("decode attention over fp8 KV / copy", f"{eight * 1e6:.0f} us", rate)


def contiguous(kv: Tensor, batch: AttentionBatch) -> tuple[Tensor, Tensor]:
    """K and V of layer 0 as ``[S, Hkv, tokens, D]``."""
    tiles = kv[batch.block_tables.long(), :, 0].permute(3, 0, 2, 1, 4, 5)  # [2, S, Hkv, blocks, B, D]
    k, v = tiles.flatten(3, 4).contiguous()
    return k, v


def _heads(x: Tensor, heads: int) -> Tensor:
    return x.repeat_interleave(heads // x.shape[1], dim=1)


def _flashinfer(bench: Bench, q: Tensor, k: Tensor, v: Tensor, taken: float) -> Line:
    name = "the same / FlashInfer"
    try:
        theirs = _flashinfer_seconds(bench, q, k, v)
    except ImportError as error:
        return Line(name, f"skipped: {error}")
    except TimeoutError:  # the part's
        raise
    except Exception as error:  # it compiles its kernels when it is first called, and may not be able to
        traceback.print_exc()
        return Line(name, f"it failed: {type(error).__name__}")
    return Line(name, f"{theirs * 1e6:.0f} us", theirs / taken, 1.0)


def _flashinfer_seconds(bench: Bench, q: Tensor, k: Tensor, v: Tensor) -> float:
    import flashinfer

    sequences, kv_heads, context, dim = k.shape
    pages, device = sequences * context // BLOCK, bench.device
    cache = torch.stack((k, v), 1).view(sequences, 2, kv_heads, -1, BLOCK, dim)
    cache = cache.permute(0, 3, 1, 2, 4, 5).flatten(0, 1).contiguous()  # HND
    wrapper: Any = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
        torch.empty(256 << 20, dtype=torch.uint8, device=device), "HND", use_tensor_cores=True
    )
    wrapper.plan(
        torch.arange(sequences + 1, dtype=torch.int32, device=device) * (context // BLOCK),
        torch.arange(pages, dtype=torch.int32, device=device),
        torch.full((sequences,), BLOCK, dtype=torch.int32, device=device),
        q.shape[1], kv_heads, dim, BLOCK, q_data_type=q.dtype, kv_data_type=k.dtype,
    )  # fmt: skip
    return bench.seconds(lambda: wrapper.run(q, cache))


def prefill_attention(bench: Bench) -> Iterator[Line]:
    model, dtype, total = bench.scale.model, bench.scale.dtype, bench.scale.prefill
    heads, kv_heads, dim = model.num_heads, model.num_kv_heads, model.head_dim
    for sequences in (1, 8):
        rows = total // sequences
        batch = bench.paged(sequences, rows, rows)
        shape = pool_shape(batch.block_tables.numel(), kv_heads, 1, BLOCK, dim)
        kv = torch.randn(shape, dtype=dtype, device=bench.device)
        q = torch.randn(sequences * rows, heads, dim, dtype=dtype, device=bench.device)
        k, v = (x[:, :, :rows] for x in contiguous(kv, batch))
        dense = q.view(sequences, rows, heads, dim).transpose(1, 2).contiguous()
        wide_k, wide_v = _heads(k, heads), _heads(v, heads)

        def flash(q: Tensor = dense, k: Tensor = wide_k, v: Tensor = wide_v) -> Tensor:
            backend = torch.nn.attention.SDPBackend.FLASH_ATTENTION
            with torch.nn.attention.sdpa_kernel([backend, torch.nn.attention.SDPBackend.MATH]):
                return F.scaled_dot_product_attention(q, k, v, is_causal=True)

        def ours(q: Tensor = q, kv: Tensor = kv, batch: AttentionBatch = batch, dim: int = dim) -> Tensor:
            return bench.kernels.paged_attention(q, kv, 0, batch, dim**-0.5)

        exact = ReferenceKernels().paged_attention(q.float(), kv.float(), 0, batch, dim**-0.5)
        wrong = error(ours(), exact)
        name = f"prefill attention, {sequences * rows} tokens, {sequences} sequences"
        yield Line(f"{name}, error", f"{wrong:.1e}", wrong, 1e-2, most=True)
        taken, theirs = bench.seconds(ours), bench.seconds(flash)
        yield Line(f"{name} / flash SDPA", f"{taken * 1e3:.2f} ms", theirs / taken, 0.8)


def block_kernels(bench: Bench) -> Iterator[Line]:
    """Gather, scatter and checksum of a long prompt's blocks."""
    model = bench.scale.model
    token = 2 * model.num_layers * model.num_kv_heads * model.head_dim * bench.scale.dtype.itemsize
    count = bench.scale.prefill // BLOCK
    pool = torch.randint(-(2**31), 2**31 - 1, (count, token * BLOCK // 4), dtype=torch.int32, device=bench.device)
    blocks, staged = torch.randperm(count, device=bench.device), torch.empty_like(pool)
    num_bytes = pool.numel() * 4
    gather = bench.seconds(lambda: transfer.gather(pool, blocks, 0, staged))
    scatter = bench.seconds(lambda: transfer.scatter(pool, blocks, 0, staged))
    checksum = bench.seconds(lambda: transfer.checksums(pool, blocks, 0, pool.shape[1]))
    name = f"of {count} blocks / copy"
    yield Line(f"gather {name}", f"{gather * 1e3:.2f} ms", 2 * num_bytes / gather / bench.copy_rate)
    yield Line(f"scatter {name}", f"{scatter * 1e3:.2f} ms", 2 * num_bytes / scatter / bench.copy_rate)
    yield Line(f"checksum {name}", f"{checksum * 1e3:.2f} ms", num_bytes / checksum / bench.copy_rate)
