"""Decoders of the Llama family (Llama, SmolLM2, Mistral, Qwen2, Qwen3), written for the paged pool.

q, k and v are one linear layer, gate and up another. Knows kernels and weights; the batch tells it where rows
stand. Invariant: row r of the output depends on the rows and pool blocks of r's own sequence only.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.linears import Linears
from engine.model_config import ModelConfig
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
        self,
        files: ModelFiles,
        kernels: Kernels,
        dtype: torch.dtype,
        max_len: int,
        device: torch.device,
        quantization: str | None = None,
    ) -> None:
        """``quantization``: of the weights of linear layers; embeddings and norms are never rounded."""
        self.config = config = files.config
        self._kernels = kernels
        self._window = config.window if config.window is not None and config.window < max_len else None
        linears = Linears(files, kernels, dtype, device, quantization)
        self._embedding = linears.tensor("model.embed_tokens.weight")
        self._layers = [_load_layer(config, linears, i) for i in range(config.num_layers)]
        self._norm = linears.tensor("model.norm.weight")
        self._head = linears.head(self._embedding if config.tied_embeddings else linears.tensor("lm_head.weight"))
        factors = files.optional("rope_factors", torch.float32)
        table = rope_table(config.head_dim, config.rope_theta, config.rope_scaling, max_len, factors)
        self._cos_sin = table.to(device)

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
            attended = kernels.paged_attention(q, kv, i, batch, scale, window=self._window)
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


def _load_layer(config: ModelConfig, linears: Linears, index: int) -> _Layer:
    attention, mlp = f"model.layers.{index}.self_attn.", f"model.layers.{index}.mlp."
    before = f"model.layers.{index}."
    return _Layer(
        input_norm=linears.tensor(f"{before}input_layernorm.weight"),
        qkv=linears.linear(config.qkv_bias, *(f"{attention}{x}_proj" for x in "qkv")),
        q_norm=linears.tensor(f"{attention}q_norm.weight") if config.qk_norm else None,
        k_norm=linears.tensor(f"{attention}k_norm.weight") if config.qk_norm else None,
        output=linears.linear(config.output_bias, f"{attention}o_proj"),
        mlp_norm=linears.tensor(f"{before}post_attention_layernorm.weight"),
        gate_up=linears.gate_up(config.mlp_bias, f"{mlp}gate_proj", f"{mlp}up_proj"),
        down=linears.linear(config.mlp_bias, f"{mlp}down_proj"),
    )
