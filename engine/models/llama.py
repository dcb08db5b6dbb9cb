"""Decoders of the Llama family (Llama, SmolLM2, Mistral, Qwen2, Qwen3), written for the paged pool.

q, k and v are one linear layer, gate and up another. Knows kernels and weights; the batch tells it where rows
stand. Invariant: row r of the output depends on the rows and pool blocks of r's own sequence only.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.rope import rope_table
from engine.weights import ModelFiles
from kernels import AttentionBatch, Kernels, Linear


@dataclass(frozen=True, slots=True)
class _Layer:
    input_norm: Tensor
    qkv: Linear
    q_norm: Tensor | None
    k_norm: Tensor | None
    output: Linear
    mlp_norm: Tensor
    gate_up: Linear  # with the activation
    down: Linear


class LlamaModel:
    """The weights of one model, packed for one kernel backend."""

    def __init__(
        self, files: ModelFiles, kernels: Kernels, dtype: torch.dtype, max_len: int, *, int8: bool = False
    ) -> None:
        """``int8``: the weights of all linear layers are rounded to int8; embeddings and norms are not."""
        self.config = config = files.config
        self._kernels = kernels
        self._embedding = files.tensor("model.embed_tokens.weight", dtype)
        self._layers = [_load_layer(files, kernels, dtype, i, int8) for i in range(config.num_layers)]
        self._norm = files.tensor("model.norm.weight", dtype)
        head = self._embedding if config.tied_embeddings else files.tensor("lm_head.weight", dtype)
        pack = kernels.pack_linear_int8 if int8 else kernels.pack_linear
        self._head = pack(head, None, torch.float32)  # rounded to bfloat16, near logits would become equal
        factors = files.optional("rope_factors", torch.float32)
        self._cos_sin = rope_table(config.head_dim, config.rope_theta, config.rope_scaling, max_len, factors)

    def forward(self, tokens: Tensor, kv: Tensor, batch: AttentionBatch) -> Tensor:
        """Hidden states after the last norm, ``[T, hidden]``, for ``tokens [T]`` int64; fills the pool's slots."""
        kernels, eps = self._kernels, self.config.rms_norm_eps
        scale = self.config.head_dim**-0.5
        residual = F.embedding(tokens, self._embedding)
        hidden = kernels.rms_norm(residual, self._layers[0].input_norm, eps)
        for i, layer in enumerate(self._layers):
            q, k, v = self._split(layer.qkv(hidden))
            if layer.q_norm is not None and layer.k_norm is not None:
                q = kernels.rms_norm(q, layer.q_norm, eps)
                k = kernels.rms_norm(k, layer.k_norm, eps)
            kernels.rope_kv_write(q, k, v, self._cos_sin, kv, i, batch)
            attended = kernels.paged_attention(q, kv, i, batch, scale)
            hidden = kernels.add_rms_norm(layer.output(attended), residual, layer.mlp_norm, eps)
            mlp = layer.down(layer.gate_up(hidden))
            following = self._layers[i + 1].input_norm if i + 1 < len(self._layers) else self._norm
            hidden = kernels.add_rms_norm(mlp, residual, following, eps)
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """``[rows, hidden]`` -> ``[rows, vocab]`` float32."""
        return self._head(hidden)

    def _split(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Views of ``qkv [T, (Hq + 2 Hkv) D]`` as ``[T, heads, D]`` each."""
        c = self.config
        rows = qkv.view(qkv.shape[0], c.num_heads + 2 * c.num_kv_heads, c.head_dim)
        first_v = c.num_heads + c.num_kv_heads
        return rows[:, : c.num_heads], rows[:, c.num_heads : first_v], rows[:, first_v:]


def _load_layer(files: ModelFiles, kernels: Kernels, dtype: torch.dtype, index: int, int8: bool) -> _Layer:
    prefix = f"model.layers.{index}."
    config = files.config

    pack = kernels.pack_linear_int8 if int8 else kernels.pack_linear

    def stacked(bias: bool, *names: str) -> tuple[Tensor, Tensor | None]:
        weights = [files.tensor(f"{prefix}{name}.weight", dtype) for name in names]
        biases = [files.tensor(f"{prefix}{name}.bias", dtype) for name in names] if bias else []
        return torch.cat(weights), torch.cat(biases) if biases else None

    def norm(name: str) -> Tensor:
        return files.tensor(f"{prefix}{name}.weight", dtype)

    return _Layer(
        input_norm=norm("input_layernorm"),
        qkv=pack(*stacked(config.qkv_bias, "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
        q_norm=norm("self_attn.q_norm") if config.qk_norm else None,
        k_norm=norm("self_attn.k_norm") if config.qk_norm else None,
        output=pack(*stacked(config.output_bias, "self_attn.o_proj")),
        mlp_norm=norm("post_attention_layernorm"),
        gate_up=kernels.pack_gate_up(*stacked(config.mlp_bias, "mlp.gate_proj", "mlp.up_proj"), int8=int8),
        down=pack(*stacked(config.mlp_bias, "mlp.down_proj")),
    )
