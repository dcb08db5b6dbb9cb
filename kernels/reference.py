"""The torch reference: plain, correct on any device, and what every other backend is held against.

Knows one step's tensors only. Attention gathers each sequence's blocks, so it costs copies that the native
backends avoid. Invariant: never writes outside the slots that the batch names.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.decoder import DecoderWeights, LayerByLayer
from kernels.interface import UNSCALED, AttentionBatch, AttentionShape, Decoder, KvScales, Linear, SampleParams


class TorchLinear:
    """``F.linear`` in the weight's dtype."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.weight, self.bias = weight, bias

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x.to(self.weight.dtype), self.weight, self.bias)


class TorchLinearWide(TorchLinear):
    """On a GPU: operands as they are, results in float32 as they were accumulated."""

    def __call__(self, x: Tensor) -> Tensor:
        y = torch.mm(x, self.weight.t(), out_dtype=torch.float32)
        return y if self.bias is None else y + self.bias.float()


class TorchLinearInt8:
    """``(x @ weight.T) * scales + bias`` in float32, from int8 weights."""

    def __init__(self, weight: Tensor, bias: Tensor | None, out_dtype: torch.dtype) -> None:
        wide = weight.float()
        self.scales = wide.abs().amax(1) / 127  # [N]
        self.weight = (wide / self.scales.clamp(min=1e-30).unsqueeze(1)).round().to(torch.int8)
        self.bias, self.out_dtype = bias, out_dtype

    def __call__(self, x: Tensor) -> Tensor:
        y = F.linear(x.float(), self.weight.float()) * self.scales
        return (y if self.bias is None else y + self.bias.float()).to(self.out_dtype)


class GateUp:
    """A linear layer of gates over ups, then the activation."""

    def __init__(self, gate_up: Linear, silu_mul: Callable[[Tensor], Tensor]) -> None:
        self._gate_up, self._silu_mul = gate_up, silu_mul

    def __call__(self, x: Tensor) -> Tensor:
        return self._silu_mul(self._gate_up(x))


class ReferenceKernels:
    name = "reference"
    capturable = False

    def check(self, shape: AttentionShape) -> None:
        if shape.num_heads % shape.num_kv_heads:
            raise ValueError(f"{shape.num_heads} query heads can't share {shape.num_kv_heads} KV heads evenly")

    def pack_linear(self, weight: Tensor, bias: Tensor | None, out_dtype: torch.dtype | None = None) -> Linear:
        dtype = out_dtype or weight.dtype
        if weight.is_cuda and dtype is torch.float32 and weight.dtype is not dtype:
            return TorchLinearWide(weight, bias)  # a weight in float32 would be read at half the speed
        return TorchLinear(weight.to(dtype), None if bias is None else bias.to(dtype))

    def pack_linear_int8(
        self, weight: Tensor, bias: Tensor | None, out_dtype: torch.dtype | None = None
    ) -> Linear:
        return TorchLinearInt8(weight, bias, out_dtype or weight.dtype)

    def pack_gate_up(self, weight: Tensor, bias: Tensor | None, *, int8: bool = False) -> Linear:
        return GateUp((self.pack_linear_int8 if int8 else self.pack_linear)(weight, bias), self.silu_mul)

    def decoder(self, weights: DecoderWeights) -> Decoder:
        return LayerByLayer(self, weights)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
        return weight * wide.to(x.dtype)

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
        residual += x
        return self.rms_norm(residual, weight, eps)

    def rope_kv_write(
        self, q: Tensor, k: Tensor, v: Tensor, cos_sin: Tensor, kv: Tensor, layer: int, batch: AttentionBatch,
        kv_scales: KvScales = UNSCALED,
    ) -> None:  # fmt: skip
        cos, sin = cos_sin[batch.positions].unsqueeze(1).chunk(2, dim=-1)  # [T, 1, D / 2] each
        for x in (q, k):
            first, second = x.float().chunk(2, dim=-1)
            x.copy_(torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1))
        block_tokens = kv.shape[4]
        blocks, offsets = batch.slots // block_tokens, batch.slots % block_tokens
        if kv.dtype is torch.float8_e4m3fn:
            k, v = _to_float8(k, kv_scales.k), _to_float8(v, kv_scales.v)
            kv = kv.view(torch.uint8)  # not every device indexes float8
        kv[blocks, :, layer, 0, offsets] = k
        kv[blocks, :, layer, 1, offsets] = v

    def paged_attention(
        self, q: Tensor, kv: Tensor, layer: int, batch: AttentionBatch, scale: float, *,
        window: int | None = None, soft_cap: float | None = None, kv_scales: KvScales = UNSCALED,
    ) -> Tensor:  # fmt: skip
        num_rows, num_heads, head_dim = q.shape
        num_kv_heads, block_tokens, float8 = kv.shape[1], kv.shape[4], kv.dtype is torch.float8_e4m3fn
        if float8:
            kv = kv.view(torch.uint8)
        out = torch.empty(num_rows, num_heads, head_dim, dtype=q.dtype, device=q.device)
        starts = batch.query_start.tolist()
        contexts = batch.context_lens.tolist()
        for s, context in enumerate(contexts):
            rows = slice(starts[s], starts[s + 1])
            table = batch.block_tables[s, : -(-context // block_tokens)]
            tiles = kv[table, :, layer]  # [blocks, Hkv, 2, B, D]
            tiles = tiles.permute(2, 1, 0, 3, 4).reshape(2, num_kv_heads, -1, head_dim)[:, :, :context]
            if float8:
                scales = torch.tensor([kv_scales.k, kv_scales.v], device=q.device).view(2, 1, 1, 1)
                tiles = (tiles.view(torch.float8_e4m3fn).float() * scales).to(q.dtype)
            mask = None
            if rows.stop - rows.start > 1 or window is not None:
                row_positions, tokens = batch.positions[rows].unsqueeze(1), torch.arange(context, device=q.device)
                mask = tokens <= row_positions
                if window is not None:
                    mask &= tokens > row_positions - window
            if soft_cap is not None:
                out[rows] = _capped_attention(q[rows], tiles, mask, scale, soft_cap)
                continue
            attended = F.scaled_dot_product_attention(
                q[rows].transpose(0, 1).unsqueeze(0),  # [1, Hq, rows, D]
                tiles[0].unsqueeze(0),
                tiles[1].unsqueeze(0),
                attn_mask=mask,
                scale=scale,
                enable_gqa=num_heads != num_kv_heads,
            )
            out[rows] = attended[0].transpose(0, 1)
        return out.view(num_rows, num_heads * head_dim)

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate) * up

    def argmax(self, logits: Tensor) -> Tensor:
        return logits.argmax(dim=-1)

    def sample(self, logits: Tensor, params: SampleParams) -> Tensor:
        greedy = params.temperature == 0
        scaled = logits / torch.where(greedy, 1.0, params.temperature).unsqueeze(1)
        floor = _floor(scaled.sort(dim=-1, descending=True).values, params)
        weights = torch.softmax(scaled.masked_fill(scaled < floor, float("-inf")), dim=-1)
        cumulative = weights.double().cumsum(dim=-1)
        targets = params.uniform.unsqueeze(1) * cumulative[:, -1:]
        drawn = torch.searchsorted(cumulative, targets, right=True).squeeze(1)
        return torch.where(greedy, logits.argmax(dim=-1), drawn.clamp(max=logits.shape[1] - 1))


def _to_float8(x: Tensor, scale: float) -> Tensor:
    """The bytes of ``x / scale``."""
    largest = torch.finfo(torch.float8_e4m3fn).max
    return (x.float() / scale).clamp(-largest, largest).to(torch.float8_e4m3fn).view(torch.uint8)


def _capped_attention(q: Tensor, tiles: Tensor, mask: Tensor | None, scale: float, soft_cap: float) -> Tensor:
    """``q [rows, Hq, D]``, ``tiles [2, Hkv, tokens, D]``, ``mask [rows, tokens]`` -> ``[rows, Hq, D]``."""
    keys, values = tiles.float().repeat_interleave(q.shape[1] // tiles.shape[1], dim=1)
    scores = soft_cap * torch.tanh(torch.einsum("rhd,htd->hrt", q.float(), keys) * (scale / soft_cap))
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return torch.einsum("hrt,htd->rhd", scores.softmax(-1), values).to(q.dtype)


def _floor(values: Tensor, params: SampleParams) -> Tensor:
    """``values [S, V]`` in descending order -> the smallest that the filters of each row keep, ``[S, 1]``."""
    floor = values[:, :1] + params.min_p.unsqueeze(1).log()
    last = torch.where(params.top_k > 0, params.top_k.clamp(max=values.shape[1]), values.shape[1]).long() - 1
    floor = torch.maximum(floor, values.gather(1, last.unsqueeze(1)))
    kept = values >= floor
    mass = torch.softmax(values.masked_fill(~kept, float("-inf")), dim=-1).cumsum(dim=-1)
    top_p = params.top_p.unsqueeze(1)
    before = ((mass < top_p) & kept).sum(dim=-1, keepdim=True)  # the one that reaches top_p is kept too
    reaches = values.gather(1, torch.minimum(before, kept.sum(dim=-1, keepdim=True) - 1).clamp(min=0))
    return torch.where(top_p < 1.0, torch.maximum(floor, reaches), floor)
