"""A model of Llama-3-8B's shape with random weights, made on the GPU: nothing is read from disk."""

from __future__ import annotations

import torch
from torch import Tensor

from engine.model_config import ModelConfig

LLAMA_3_8B = ModelConfig(
    architecture="LlamaForCausalLM",
    vocab_size=128_256,
    hidden_size=4096,
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    intermediate_size=14_336,
    rms_norm_eps=1e-5,
    rope_theta=500_000.0,
    max_position=8192 + 512,
    tied_embeddings=False,
    qkv_bias=False,
    output_bias=False,
    mlp_bias=False,
    qk_norm=False,
)


class RandomFiles:
    """`engine.weights.ModelFiles` of normal noise; the same name gives the same weight."""

    def __init__(self, config: ModelConfig, device: torch.device) -> None:
        self.config, self._device = config, device
        c, kv = config, config.num_kv_heads * config.head_dim
        wide = c.num_heads * c.head_dim
        self._shapes = {
            "embed_tokens": (c.vocab_size, c.hidden_size), "lm_head": (c.vocab_size, c.hidden_size),
            "q_proj": (wide, c.hidden_size), "k_proj": (kv, c.hidden_size), "v_proj": (kv, c.hidden_size),
            "o_proj": (c.hidden_size, wide), "gate_proj": (c.intermediate_size, c.hidden_size),
            "up_proj": (c.intermediate_size, c.hidden_size), "down_proj": (c.hidden_size, c.intermediate_size),
        }  # fmt: skip

    def tensor(self, name: str, dtype: torch.dtype) -> Tensor:
        module = name.removesuffix(".weight").rpartition(".")[2]
        if "norm" in module:
            return torch.ones(self.config.hidden_size, dtype=dtype, device=self._device)
        seed = int.from_bytes(name.encode()[-6:], "little") + sum(name.encode())
        generator = torch.Generator(self._device).manual_seed(seed)
        shape = self._shapes[module]
        return torch.randn(shape, generator=generator, dtype=dtype, device=self._device) * 0.02

    def optional(self, name: str, dtype: torch.dtype) -> Tensor | None:
        return None

    def fp8(self, name: str) -> tuple[Tensor, Tensor] | None:
        return None

    def digest(self) -> str:
        return "random"

    def tokenizer(self) -> tuple[str, str, dict[str, str]]:
        return "", "", {}

    @property
    def layer_weights(self) -> int:
        """Of the matrices of one layer."""
        return sum(n * k for name, (n, k) in self._shapes.items() if name.endswith("_proj"))

    def weight_bytes(self, itemsize: int = 2) -> int:
        """Bytes of weights that one decode step reads: all but the embedding, of which it reads rows."""
        shapes = self._shapes
        head = shapes["lm_head"][0] * shapes["lm_head"][1]
        return (self.config.num_layers * self.layer_weights + head) * itemsize
