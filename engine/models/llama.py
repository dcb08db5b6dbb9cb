"""Decoders of the Llama family (Llama, SmolLM2, Mistral, Qwen2, Qwen3), written for the paged pool.

Knows names of weights and which of them are packed together; the layers themselves are the kernel backend's.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.linears import Linears
from engine.model_config import ModelConfig
from engine.rope import rope_table
from engine.weights import ModelFiles
from kernels import AttentionBatch, DecoderLayer, DecoderWeights, Kernels


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
        linears = Linears(files, kernels, dtype, device, quantization)
        self._embedding = linears.tensor("model.embed_tokens.weight")
        layers = [_load_layer(config, linears, i) for i in range(config.num_layers)]
        norm = linears.tensor("model.norm.weight")
        self._head = linears.head(self._embedding if config.tied_embeddings else linears.tensor("lm_head.weight"))
        factors = files.optional("rope_factors", torch.float32)
        table = rope_table(config.head_dim, config.rope_theta, config.rope_scaling, max_len, factors)
        self._decoder = kernels.decoder(
            DecoderWeights(
                layers=layers,
                last_norm=norm,
                cos_sin=table.to(device),
                num_heads=config.num_heads,
                num_kv_heads=config.num_kv_heads,
                head_dim=config.head_dim,
                eps=config.rms_norm_eps,
                window=config.window if config.window is not None and config.window < max_len else None,
            )
        )

    def forward(self, tokens: Tensor, kv: Tensor, batch: AttentionBatch) -> Tensor:
        """Hidden states after the last norm, ``[T, hidden]``, for ``tokens [T]`` int64; fills the pool's slots."""
        return self._decoder(F.embedding(tokens, self._embedding), kv, batch)

    def logits(self, hidden: Tensor) -> Tensor:
        """``[rows, hidden]`` -> ``[rows, vocab]`` float32."""
        return self._head(hidden)


def _load_layer(config: ModelConfig, linears: Linears, index: int) -> DecoderLayer:
    attention, mlp = f"model.layers.{index}.self_attn.", f"model.layers.{index}.mlp."
    before = f"model.layers.{index}."
    return DecoderLayer(
        input_norm=linears.tensor(f"{before}input_layernorm.weight"),
        qkv=linears.linear(config.qkv_bias, *(f"{attention}{x}_proj" for x in "qkv")),
        q_norm=linears.tensor(f"{attention}q_norm.weight") if config.qk_norm else None,
        k_norm=linears.tensor(f"{attention}k_norm.weight") if config.qk_norm else None,
        output=linears.linear(config.output_bias, f"{attention}o_proj"),
        mlp_norm=linears.tensor(f"{before}post_attention_layernorm.weight"),
        gate_up=linears.gate_up(config.mlp_bias, f"{mlp}gate_proj", f"{mlp}up_proj"),
        down=linears.linear(config.mlp_bias, f"{mlp}down_proj"),
    )
