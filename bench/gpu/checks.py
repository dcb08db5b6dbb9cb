"""Every kernel against float64 or float32, as relative error norms; what must be equal, as how much of it is.

Shapes are those of the model. `tests/kernels/test_triton_gpu.py` has many more; these few compile in a minute.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from bench.gpu.measure import Bench, Line, error
from engine import SamplingParams
from engine.scheduler import Scheduled
from engine.sequence import Sequence
from kernels import ReferenceKernels, SampleParams, pool_shape
from kernels.fp8 import pack_linear_fp8, quantize_channels
from kernels.interface import AttentionBatch, KvScales
from kernels.triton import rows, transfer
from kernels.triton.backend import OLDEST_FP8
from kvtransfer.checksums import checksum_words
from splitserve.hashing import PrefixHasher

BLOCK = 16
FP8 = torch.float8_e4m3fn
BOUNDS = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-5}
FP8_BOUND = 0.15  # of logits after two layers: e4m3 has three bits behind the point


def checks(bench: Bench) -> Iterator[Line]:
    first = bench.scale.dtype
    yield from _model_kernels(bench, first)
    yield _sampling(bench)
    yield from _blocks(bench)
    yield from _fp8(bench)
    for dtype in BOUNDS if bench.device.type == "cuda" else ():
        if dtype is not first:
            yield from _model_kernels(bench, dtype)


def _model_kernels(bench: Bench, dtype: torch.dtype) -> Iterator[Line]:
    yield from _attention(bench, dtype)
    yield from _rope(bench, dtype)
    yield from _rows(bench, dtype)


def _has_fp8(bench: Bench) -> bool:
    return bench.device.type != "cuda" or torch.cuda.get_device_capability(bench.device) >= OLDEST_FP8


def _off(name: str, got: Tensor, expected: Tensor, bound: float) -> Line:
    wrong = error(got, expected)
    return Line(f"{name}, error", f"{wrong:.1e}", wrong, bound, most=True)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _random(bench: Bench, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, device=bench.device).to(dtype)


def _attention(bench: Bench, dtype: torch.dtype) -> Iterator[Line]:
    model, context = bench.scale.model, bench.scale.decode_context
    batches = {"decode": bench.paged(8, 1, context), "prefill": bench.paged(2, context // 8, context)}
    for what, batch in batches.items():
        pool = pool_shape(batch.block_tables.numel(), model.num_kv_heads, 1, BLOCK, model.head_dim)
        kv = _random(bench, *pool, dtype=dtype)
        q = _random(bench, batch.positions.numel(), model.num_heads, model.head_dim, dtype=dtype)
        name = f"{what} attention, {_name(dtype)}"
        yield _attended(bench, name, q, kv, batch)
        yield _attended(bench, f"{name}, window, soft cap", q, kv, batch, context // 3, 20.0)
        if _has_fp8(bench):
            yield _attended(bench, f"{name}, fp8 KV", q, kv.to(FP8), batch)


def _attended(
    bench: Bench, name: str, q: Tensor, kv: Tensor, batch: AttentionBatch,
    window: int | None = None, cap: float | None = None,
) -> Line:  # fmt: skip
    scale, wide = q.shape[2] ** -0.5, kv if kv.dtype is FP8 else kv.double()
    scales = KvScales(0.5, 3.0) if kv.dtype is FP8 else KvScales()
    got = bench.kernels.paged_attention(q, kv, 0, batch, scale, window=window, soft_cap=cap, kv_scales=scales)
    exact = ReferenceKernels().paged_attention(
        q.double(), wide, 0, batch, scale, window=window, soft_cap=cap, kv_scales=scales
    )
    return _off(name, got, exact, BOUNDS[q.dtype])


def _rope(bench: Bench, dtype: torch.dtype) -> Iterator[Line]:
    model, context = bench.scale.model, bench.scale.decode_context
    batch, dim = bench.paged(2, context // 8, context), model.head_dim
    angles = 6 * torch.rand(context, dim // 2, device=bench.device)
    table = torch.cat((angles.cos(), angles.sin()), dim=1)
    heads = (model.num_heads, model.num_kv_heads, model.num_kv_heads)
    q, k, v = (_random(bench, batch.positions.numel(), n, dim, dtype=dtype) for n in heads)
    kv = torch.zeros(
        pool_shape(batch.block_tables.numel(), model.num_kv_heads, 1, BLOCK, dim), dtype=dtype, device=bench.device
    )
    wide_q, wide_k, wide_v, wide_kv = (x.float() for x in (q, k, v, kv))
    if dtype is torch.float32:
        wide_q, wide_k, wide_v, wide_kv = (x.clone() for x in (q, k, v, kv))
    bench.kernels.rope_kv_write(q, k, v, table, kv, 0, batch)
    ReferenceKernels().rope_kv_write(wide_q, wide_k, wide_v, table, wide_kv, 0, batch)
    yield _off(f"rope, {_name(dtype)}", q, wide_q, BOUNDS[dtype])
    yield _off(f"KV write, {_name(dtype)}", kv, wide_kv, BOUNDS[dtype])


def _rows(bench: Bench, dtype: torch.dtype) -> Iterator[Line]:
    width, kernels, bound = bench.scale.model.hidden_size, bench.kernels, BOUNDS[dtype]
    x, residual = (_random(bench, 64, width, dtype=dtype) for _ in range(2))
    weight, total = _random(bench, width, dtype=dtype), (x + residual).double()

    def norm(x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * weight.double()

    yield _off(f"RMS norm, {_name(dtype)}", kernels.rms_norm(x, weight, 1e-5), norm(x.double()), bound)
    got = kernels.add_rms_norm(x, residual, weight, 1e-5)
    yield _off(f"RMS norm with residual, {_name(dtype)}", got, norm(total), bound)
    gate_up = _random(bench, 64, 2 * bench.scale.model.intermediate_size, dtype=dtype)
    gate, up = gate_up.double().chunk(2, dim=1)
    yield _off(f"silu times up, {_name(dtype)}", kernels.silu_mul(gate_up), gate * gate.sigmoid() * up, bound)


def _sampling(bench: Bench) -> Line:
    settings = [
        (0.0, 0, 1.0, 0.0),
        (1.0, 0, 1.0, 0.0),
        (0.7, 5, 1.0, 0.0),
        (1.0, 0, 0.8, 0.0),
        (0.9, 40, 0.9, 0.1),
    ]
    columns = [torch.tensor(x, device=bench.device) for x in zip(*settings * 8, strict=True)]
    temperature, top_k, top_p, min_p = columns
    uniform = torch.rand(len(temperature), dtype=torch.float64, device=bench.device)
    params = SampleParams(temperature, top_k.int(), top_p, min_p, uniform)
    logits = 3 * _random(bench, len(temperature), bench.scale.model.vocab_size)
    same = bench.kernels.sample(logits, params) == ReferenceKernels().sample(logits, params)
    return _equal("sampled tokens equal to the reference's", same, 0.95)  # a rounding may move a draw


def _equal(name: str, same: Tensor, least: float = 1.0) -> Line:
    right = int(same.sum())
    return Line(name, f"{right} of {same.numel()}", right / same.numel(), least)


def _blocks(bench: Bench) -> Iterator[Line]:
    pool = torch.randint(-(2**31), 2**31 - 1, (16, 5000), dtype=torch.int32, device=bench.device)
    blocks = torch.tensor([15, 0, 7], device=bench.device)
    staged, other = torch.zeros(3, 4500, dtype=torch.int32, device=bench.device), torch.zeros_like(pool)
    transfer.gather(pool, blocks, 100, staged)
    yield _equal("words gathered", staged == pool[blocks, 100:4600])
    transfer.scatter(other, blocks, 100, staged)
    wanted = torch.zeros_like(pool)
    wanted[blocks, 100:4600] = staged
    yield _equal("words scattered", other == wanted)
    sums = torch.tensor([x % 2**32 for x in transfer.checksums(pool, blocks, 100, 4500).tolist()])
    expected = torch.tensor([checksum_words(row.numpy().data) for row in staged.cpu()])
    yield _equal("checksums equal to the host's", sums == expected)


def _fp8(bench: Bench) -> Iterator[Line]:
    """The rounding of rows, one layer, and an engine with ``--quantization fp8``."""
    if not _has_fp8(bench):
        yield Line("fp8 weights", "skipped: this GPU has no float8")
        return
    model = bench.scale.model
    x = _random(bench, 64, model.hidden_size, dtype=bench.scale.dtype)
    if bench.device.type == "cuda":  # Triton's interpreter rounds wrongly
        (rounded, _scales), (expected, _expected_scales) = rows.quantize_rows(x), quantize_channels(x)
        yield _equal("bytes of rounded rows", rounded.view(torch.uint8) == expected.view(torch.uint8))
    weight, scales = quantize_channels(_random(bench, 3 * model.hidden_size, model.hidden_size))
    got = pack_linear_fp8(weight, scales, None, bench.scale.dtype)(x)
    inputs, input_scales = quantize_channels(x)
    exact = (inputs.double() * input_scales.unsqueeze(1)) @ (weight.double() * scales.unsqueeze(1)).T
    yield _off("fp8 layer, of rounded operands", got, exact, BOUNDS[torch.bfloat16])
    wide = Bench(replace(bench.scale, model=replace(model, num_layers=2), dtype=torch.float32), bench.device)
    yield _off("logits of two layers in fp8", _logits(wide, "fp8"), _logits(wide, None), FP8_BOUND)


def _logits(bench: Bench, quantization: str | None) -> Tensor:
    """After a prompt, ``[1, vocab]``."""
    tokens = list(range(3, 3 + BLOCK))
    engine = bench.engine(
        quantization=quantization, max_num_seqs=1, max_num_batched_tokens=64, gpu_memory_utilization=0.3
    )
    greedy = SamplingParams(temperature=0)
    longest, hasher = engine.runner.max_model_len, PrefixHasher(b"")
    sequence = Sequence("check", tokens, len(tokens), greedy, frozenset(), longest, hasher)
    sequence.blocks = [0, 1]
    logits = engine.runner.launch([Scheduled.of(sequence, len(tokens))]).logits.cpu()
    del engine
    gc.collect()
    return logits
