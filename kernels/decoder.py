"""The layers of a decoder of the Llama family: what a backend needs of them, and how its kernels make them up.

q, k and v are one linear layer, gate and up another. Knows packed weights and kernels; the batch tells where rows
stand. Invariant: row r of the output depends on the rows and pool blocks of r's own sequence only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from kernels.interface import AttentionBatch, Kernels, Linear


@dataclass(frozen=True, slots=True)
class DecoderLayer:
    """One layer, packed for a backend."""

    input_norm: Tensor
    qkv: Linear
    q_norm: Tensor | None  # of each head; both or none
    k_norm: Tensor | None
    output: Linear
    mlp_norm: Tensor
    gate_up: Linear  # with the activation
    down: Linear


@dataclass(frozen=True, slots=True)
class DecoderWeights:
    """All layers and what they share."""

    layers: Sequence[DecoderLayer]
    last_norm: Tensor
    cos_sin: Tensor  # [positions, D] float32, cosines in the first half
    num_heads: int
    num_kv_heads: int
    head_dim: int
    eps: float
    window: int | None  # tokens that a row sees, its own included; None: all


class LayerByLayer:
    """A decoder as one kernel of a backend after another."""

    def __init__(self, kernels: Kernels, weights: DecoderWeights) -> None:
        self._kernels, self._weights = kernels, weights

    def __call__(self, residual: Tensor, kv: Tensor, batch: AttentionBatch) -> Tensor:
        """As `kernels.interface.Decoder`."""
        kernels, w = self._kernels, self._weights
        scale = w.head_dim**-0.5
        hidden = kernels.rms_norm(residual, w.layers[0].input_norm, w.eps)
        for i, layer in enumerate(w.layers):
            q, k, v = self._split(layer.qkv(hidden))
            if layer.q_norm is not None and layer.k_norm is not None:
                q = kernels.rms_norm(q, layer.q_norm, w.eps)
                k = kernels.rms_norm(k, layer.k_norm, w.eps)
            kernels.rope_kv_write(q, k, v, w.cos_sin, kv, i, batch)
            attended = kernels.paged_attention(q, kv, i, batch, scale, window=w.window)
            hidden = kernels.add_rms_norm(layer.output(attended), residual, layer.mlp_norm, w.eps)
            mlp = layer.down(layer.gate_up(hidden))
            following = w.layers[i + 1].input_norm if i + 1 < len(w.layers) else w.last_norm
            hidden = kernels.add_rms_norm(mlp, residual, following, w.eps)
        return hidden

    def _split(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Views of ``qkv [T, (Hq + 2 Hkv) D]`` as ``[T, heads, D]`` each."""
        w = self._weights
        rows = qkv.view(qkv.shape[0], w.num_heads + 2 * w.num_kv_heads, w.head_dim)
        first_v = w.num_heads + w.num_kv_heads
        return rows[:, : w.num_heads], rows[:, w.num_heads : first_v], rows[:, first_v:]
